"""Robust least squares on the offsets of traits: Levenberg-Marquardt as in tools.calibrate, every prior at zero.

In: a problem, parameters, weights. Out: the offsets that minimise sum w rho(log ratio) + prior, and what a fit without
some of the rows would have predicted for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from tools.calibrate.crossval import DAMPING, STEPS
from tools.calibrate.solve import Solution, Target, gauss_newton, minimise
from tools.calibrate_serving.problem import Problem
from tools.calibrate_serving.rows import Rows
from tools.calibrate_serving.traits import FloatArray, Parameter, engines, within

STEP = 0.03
TURNS = 12
ENOUGH = 1e-3
"""Relative gain of a turn below which the fit has ended."""


def jacobian(problem: Problem, chosen: Sequence[Parameter], offsets: FloatArray, base: FloatArray) -> FloatArray:
    """Slopes of the residuals, by central differences: a trait at one of its bounds has half a slope, not none."""
    columns: list[FloatArray] = []
    for index, parameter in enumerate(chosen):
        sides: list[FloatArray] = []
        for step in (STEP, -STEP):
            moved = offsets.copy()
            moved[index] += step
            sides.append(problem.residuals(engines(chosen, moved), parameter, base))
        columns.append((sides[0] - sides[1]) / (2 * STEP))
    return np.stack(columns, axis=1)


def solve(
    problem: Problem, chosen: Sequence[Parameter], rows: Rows, say: Callable[[str], None] = lambda _: None
) -> Solution:
    """Minimise from what was assumed."""
    nothing = np.zeros(len(chosen))
    target = Target(
        residuals=lambda free: problem.residuals(engines(chosen, free)),
        slope=lambda free, base: jacobian(problem, chosen, free, base),
        within=lambda free: within(chosen, free),
        weight=rows.weight,
        scale=rows.scale,
        prior=nothing,
        sigma=np.array([p.sigma for p in chosen]),
    )
    return minimise(target, nothing, TURNS, ENOUGH, say)


def left_out(
    problem: Problem, chosen: Sequence[Parameter], whole: Solution, rows: Rows, fold: NDArray[np.int64]
) -> FloatArray:
    """Residual of every row from a fit without its fold: Gauss-Newton steps from the whole fit along its slopes; the
    rows that were left out are then priced anew. An engine left out whole is left with the traits of its base."""
    sigma, prior = np.array([p.sigma for p in chosen]), np.zeros(len(chosen))
    residuals = np.full(len(rows), np.nan)
    for name in np.unique(fold):
        out = fold == name
        weight = np.where(out, 0.0, rows.weight)
        free = whole.free
        for _ in range(STEPS):
            seen = whole.residuals + whole.jacobian @ (free - whole.free)
            free = free + gauss_newton(whole.jacobian, seen, weight, rows.scale, free, prior, sigma, DAMPING)
        asked = Problem([group for group in problem.groups if out[group.rows].any()], problem.measured)
        residuals[out] = asked.residuals(engines(chosen, free))[out]
    return residuals
