"""Robust least squares on the offsets of traits: Levenberg-Marquardt as in tools.calibrate, every prior at zero.

In: a problem, parameters, weights. Out: the offsets that minimise sum w rho(log ratio) + prior, and what a fit without
some of the rows would have predicted for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tools.calibrate.crossval import DAMPING, STEPS
from tools.calibrate.solve import PRIOR_WEIGHT, Solution, gauss_newton, loss, prior_cost, robust_weight
from tools.calibrate_serving.problem import Problem
from tools.calibrate_serving.rows import Rows
from tools.calibrate_serving.traits import FloatArray, Parameter, engines, within

STEP = 0.03
TURNS, TRIES = 12, 5
LEAST_DAMPING = 1e-3
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


@dataclass(frozen=True)
class Point:
    """Offsets, the residuals there, and their cost."""

    free: FloatArray
    residuals: FloatArray
    cost: float


def solve(
    problem: Problem, chosen: Sequence[Parameter], rows: Rows, say: Callable[[str], None] = lambda _: None
) -> Solution:
    """Minimise from what was assumed."""
    sigma, prior = np.array([p.sigma for p in chosen]), np.zeros(len(chosen))

    def at(free: FloatArray) -> Point:
        residuals = problem.residuals(engines(chosen, free))
        return Point(free, residuals, loss(residuals, rows.weight, rows.scale) + prior_cost(free, prior, sigma))

    here, damping = at(prior), 1.0
    slope = jacobian(problem, chosen, here.free, here.residuals)
    for turn in range(TURNS):
        before = here
        for _ in range(TRIES):
            step = gauss_newton(slope, here.residuals, rows.weight, rows.scale, here.free, prior, sigma, damping)
            trial = at(within(chosen, here.free + step))
            if trial.cost < here.cost:
                here, damping = trial, max(damping / 4.0, LEAST_DAMPING)
                break
            damping *= 4.0
        say(f"turn {turn}: cost {here.cost:.1f}, gain {before.cost - here.cost:.2f}")
        if here is before:
            break
        slope = jacobian(problem, chosen, here.free, here.residuals)
        if before.cost - here.cost < ENOUGH * abs(before.cost):
            break
    w = robust_weight(here.residuals, rows.weight, rows.scale)
    normal = slope.T @ (w[:, None] * slope) + np.diag(2 * PRIOR_WEIGHT / sigma**2)
    return Solution(here.free, here.residuals, slope, np.sqrt(np.diag(np.linalg.inv(normal))))


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
