"""Serving rows predicted by the traits as shipped, and by fits that have not seen them.

In: a file of rows. Out: tokens/s per GPU per row id and fit. Folds and re-solving are tools.calibrate_serving's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tools.accuracy.store import kept, sources
from tools.accuracy.training import DEPENDS_ON, Held
from tools.calibrate.solve import Solution
from tools.calibrate_serving.folds import predicted
from tools.calibrate_serving.problem import problem_of
from tools.calibrate_serving.rows import load_rows
from tools.calibrate_serving.solve import jacobian
from tools.calibrate_serving.traits import engines, parameters, shipped


def held_out(path: Path, say: Callable[[str], None]) -> Held:
    """Predictions of every row of tiers A and B, from the store where code, traits and rows are the same."""
    here = [Path(__file__), path, *sources(*DEPENDS_ON, "tools/calibrate_serving")]
    return kept("serving", here, (), lambda: predict(path, say))


def predict(path: Path, say: Callable[[str], None]) -> Held:
    """The work of `held_out`: one Jacobian at the shipped traits, then a few steps per fold."""
    rows = load_rows(path)
    problem = problem_of(rows)
    chosen = parameters(case.stack.name for case in rows.cases)
    say(f"{len(rows)} serving rows, {len(chosen)} traits")
    free = shipped(chosen)
    base = problem.residuals(engines(chosen, free))
    whole = Solution(free, base, jacobian(problem, chosen, free, base), np.zeros(len(free)))
    return predicted(problem, chosen, whole, rows)
