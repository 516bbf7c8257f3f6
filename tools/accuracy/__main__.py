"""`python -m tools.accuracy FOLDER`: docs/accuracy.md and its plots from the measurements in FOLDER, and the
spread that the cost model reports with every estimate (src/meshwright/cost/data/spread.toml).

Cross-validation and other tools' answers are kept in build/accuracy: a second run takes seconds unless the model, its
constants or the rows have changed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter

from tools.accuracy.evidence import gather
from tools.accuracy.goals import goals
from tools.accuracy.page import page, plots
from tools.accuracy.spread import spread_toml
from tools.accuracy.store import ROOT, replace_text

PAGE = ROOT / "docs/accuracy.md"
SPREAD = ROOT / "src/meshwright/cost/data/spread.toml"
RESIDUALS = Path(__file__).with_name("residuals.md")
SERVING_SECONDS = 1800.0


def main() -> None:
    """Gather, write, and say which goals are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with train.jsonl, train_oom.jsonl and serve.jsonl")
    parser.add_argument("--serving-seconds", type=float, default=SERVING_SECONDS, help="time to ask aiconfigurator for")
    chosen = parser.parse_args()
    began = perf_counter()

    def say(text: str) -> None:
        print(f"{perf_counter() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    evidence = gather(chosen.folder, chosen.serving_seconds, say)
    for name, picture in plots(evidence).items():
        replace_text(PAGE.parent / "accuracy" / name, picture)
    memory = [row for row in evidence.report.scored if row.memory is not None]
    replace_text(SPREAD, spread_toml(evidence.training, memory))
    replace_text(PAGE, page(evidence, RESIDUALS.read_text(encoding="utf-8")))
    for goal in goals(evidence):
        print("  ".join(goal.cells()))
    say(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
