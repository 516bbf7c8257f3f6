"""`python -m tools.calibrate ROWS.jsonl`: fit the catalogue's constants, cross-validate, write both down.

Out: src/meshwright/cost/data/fitted.toml and docs/calibration.md. --start continues from the last fit.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from time import perf_counter

import numpy as np
from tools.calibrate.crossval import folds, left_out
from tools.calibrate.parameters import Parameter, assumed, last_fit
from tools.calibrate.problem import Problem, groups
from tools.calibrate.relevant import relevant
from tools.calibrate.rows import Rows, load_rows
from tools.calibrate.solve import Solution, solve
from tools.calibrate.write import error_table, fitted_toml

ROOT = Path(__file__).resolve().parents[2]
FITTED = ROOT / "src/meshwright/cost/data/fitted.toml"
REPORT = ROOT / "docs/calibration.md"
FOLDS = 5
SMALLEST_FAMILY = 5
"""Families with fewer rows are left out together."""


def main() -> None:
    """Parse, fit, validate, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, help="training measurements, one JSON object a line")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--fresh", action="store_true", help="start from the assumed values, not from the last fit")
    parser.add_argument("--no-validation", action="store_true", help="fit and write the constants only")
    chosen = parser.parse_args()
    began = perf_counter()

    def say(text: str) -> None:
        print(f"{perf_counter() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    rows = load_rows(chosen.rows)
    problem = Problem(groups(rows.cases), rows.measured_s, rows.weight)
    parameters = relevant(problem.groups)
    say(f"{len(rows)} rows in {len(problem.groups)} groups, {len(parameters)} constants")
    prior = assumed(parameters)
    start = prior if chosen.fresh else last_fit(parameters)
    solution = solve(problem, parameters, start, prior, rows.scale, chosen.iterations, say)
    _replace(FITTED, fitted_toml(parameters, solution, len(rows)))
    say(f"wrote {FITTED.relative_to(ROOT)}")
    if not chosen.no_validation:
        _replace(REPORT, _report(rows, problem, parameters, solution, prior, say))
        say(f"wrote {REPORT.relative_to(ROOT)}")


def _report(
    rows: Rows, problem: Problem, parameters: list[Parameter], solution: Solution, prior: np.ndarray, say: object
) -> str:
    """The tables of docs/calibration.md."""
    speak = say if callable(say) else print
    crossed = left_out(problem, parameters, solution, prior, rows.scale, folds(rows.config_groups, FOLDS), speak)
    names = sorted(f for f, count in Counter(rows.families).items() if count >= SMALLEST_FAMILY)
    family = np.array([names.index(f) if f in names else -1 for f in rows.families])
    alone = left_out(problem, parameters, solution, prior, rows.scale, family, speak)
    sections = [
        "# Calibration",
        "",
        "Errors of predicted tokens/s per GPU on the published training rows (tiers A and B), made by",
        f"`make calibrate-catalogue`: {len(rows)} rows, {len(parameters)} constants. *Cross-validated*:",
        f"{FOLDS} folds over `config_group`, no group split. *Leave one family out*: predicted by a fit that saw no",
        "row of the family.",
    ]
    for title, residuals in (
        ("Fitted", solution.residuals),
        ("Cross-validated", crossed),
        ("Leave one family out", alone),
    ):
        by_tier = error_table(rows, residuals, lambda i: f"tier {rows.tiers[i]}, {rows.kinds[i]}")
        by_family = error_table(rows, residuals, lambda i: rows.families[i])
        sections += ["", f"## {title}", "", by_tier, "", by_family]
    return "\n".join(sections) + "\n"


def _replace(path: Path, text: str) -> None:
    """Write beside, flush to disk, rename."""
    beside = path.with_suffix(path.suffix + ".new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


if __name__ == "__main__":
    main()
