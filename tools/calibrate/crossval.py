"""Predictions of rows that a fit has not seen: folds over config_group, and families left out one by one.

In: a problem and the solution of the whole. Out: residuals of every row from a fit without it. A fold starts from the
whole solution and re-solves without its rows: Gauss-Newton steps on the whole fit's Jacobian, residuals computed anew
at every step.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from tools.calibrate.parameters import Constants, Parameter
from tools.calibrate.problem import FloatArray, Problem
from tools.calibrate.solve import Solution, gauss_newton

STEPS = 2
DAMPING = 0.1


def folds(groups: Sequence[str], count: int) -> NDArray[np.int64]:
    """Fold of every row: rows of one group share it."""
    return np.array([zlib.crc32(name.encode()) % count for name in groups])


def left_out(
    problem: Problem,
    parameters: Sequence[Parameter],
    whole: Solution,
    prior: FloatArray,
    scale: FloatArray,
    fold: NDArray[np.int64],
    say: Callable[[str], None] = lambda _: None,
) -> FloatArray:
    """Residual of every row from the fit without its fold."""
    residuals = np.full(len(fold), np.nan)
    for name in np.unique(fold):
        out = fold == name
        kept = replace(problem, weight=np.where(out, 0.0, problem.weight))
        found = _resolved(kept, parameters, whole, prior, scale)
        residuals[out] = found[out]
        error = np.exp(-found[out]) - 1
        say(f"fold {name}: {out.sum()} rows, median error {np.median(np.abs(error)):.3f}")
    return residuals


def _resolved(
    problem: Problem, parameters: Sequence[Parameter], whole: Solution, prior: FloatArray, scale: FloatArray
) -> FloatArray:
    """Residuals of the rows without weight, at the constants re-solved from the others."""
    sigma = np.array([p.range.prior_sigma for p in parameters])
    free, residuals = whole.free.copy(), whole.residuals
    unseen = replace(problem, groups=[g for g in problem.groups if (problem.weight[g.rows] == 0).any()])
    for step in range(STEPS):
        free = free + gauss_newton(whole.jacobian, residuals, problem.weight, scale, free, prior, sigma, DAMPING)
        last = step == STEPS - 1
        residuals = (unseen if last else problem).residuals(Constants.of(parameters, free))
    return residuals
