"""Every serving row predicted three times: by the traits as shipped, and by fits that have not seen it.

In: rows, their problem, a solution. Out: tokens/s per GPU per row id and fit (`FITS`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tools.calibrate.crossval import folds
from tools.calibrate.solve import Solution
from tools.calibrate_serving.problem import Problem
from tools.calibrate_serving.rows import Rows
from tools.calibrate_serving.solve import left_out
from tools.calibrate_serving.traits import Parameter

FOLDS = 5
FITS = ("fitted", "cross-validated", "leave one release out")
"""`cross-validated`: folds over `config_groups`. `leave one release out`: by a fit that saw no row of the engine's
release, with the traits of the release it is based on, or assumed ones where it is based on none."""


def predicted(
    problem: Problem, chosen: Sequence[Parameter], whole: Solution, rows: Rows
) -> dict[str, dict[str, float]]:
    """Rates by fit and row id."""
    releases = [case.stack.name for case in rows.cases]
    apart = {
        "cross-validated": folds(rows.config_groups, FOLDS),
        "leave one release out": np.array([sorted(set(releases)).index(name) for name in releases]),
    }
    residuals = {"fitted": whole.residuals}
    residuals |= {fit: left_out(problem, chosen, whole, rows, fold) for fit, fold in apart.items()}
    return {
        fit: dict(zip(rows.ids, (rows.measured * np.exp(found)).tolist(), strict=True))
        for fit, found in residuals.items()
    }
