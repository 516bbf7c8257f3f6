"""`python -m tools.calibrate_serving ROWS.jsonl`: fit the traits of inference engines to serving measurements.

Out: src/meshwright/cost/data/serving_fitted.toml; errors of three fits on stdout (docs/accuracy.md has them in full).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter

from tools.accuracy.store import ROOT, replace_text
from tools.calibrate_serving.folds import predicted
from tools.calibrate_serving.problem import problem_of
from tools.calibrate_serving.rows import load_rows
from tools.calibrate_serving.solve import solve
from tools.calibrate_serving.traits import parameters
from tools.calibrate_serving.write import error_lines, fitted_toml

FITTED = ROOT / "src/meshwright/cost/data/serving_fitted.toml"


def main() -> None:
    """Parse, fit, write, validate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, help="serving measurements, one JSON object a line")
    chosen = parser.parse_args()
    began = perf_counter()

    def say(text: str) -> None:
        print(f"{perf_counter() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    rows = load_rows(chosen.rows)
    problem = problem_of(rows)
    traits = parameters(case.stack.name for case in rows.cases)
    say(f"{len(rows)} rows in {len(problem.groups)} groups, {len(traits)} traits")
    solution = solve(problem, traits, rows, say=say)
    replace_text(FITTED, fitted_toml(traits, solution, len(rows)))
    say(f"wrote {FITTED.relative_to(ROOT)}")
    for fit, rates in predicted(problem, traits, solution, rows).items():
        print(f"{fit}: rows, median, mean, 90th percentile of errors")
        print("\n".join(error_lines(rows, rates, lambda i: rows.families[i])))


if __name__ == "__main__":
    main()
