"""Robust least squares: Levenberg-Marquardt with a numerical Jacobian, iteratively reweighted, with a prior.

In: a problem, parameters, their starting point. Out: the point that minimises sum w rho(log ratio) + prior. rho is the
Student-t loss (3 degrees of freedom): quadratic for ordinary residuals, logarithmic for outliers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tools.calibrate.parameters import Constants, Parameter
from tools.calibrate.problem import Problem

FloatArray = NDArray[np.float64]
DEGREES = 3.0
PRIOR_WEIGHT = 0.3
STEP = 0.03
CONVERGED = 3e-4
"""The fit ends where a turn lowers its cost by less than this share."""


@dataclass(frozen=True)
class Solution:
    """The free vector, its residuals, the Jacobian there, and standard errors on the free scale."""

    free: FloatArray
    residuals: FloatArray
    jacobian: FloatArray
    error: FloatArray


def loss(residuals: FloatArray, weight: FloatArray, scale: FloatArray) -> float:
    return float((weight * (DEGREES + 1) / 2 * np.log1p((residuals / scale) ** 2 / DEGREES)).sum())


def robust_weight(residuals: FloatArray, weight: FloatArray, scale: FloatArray) -> FloatArray:
    """Weights that make a quadratic of the loss (iteratively reweighted least squares)."""
    return weight * (DEGREES + 1) / (DEGREES + (residuals / scale) ** 2) / scale**2


def prior_cost(free: FloatArray, prior: FloatArray, sigma: FloatArray) -> float:
    return float(PRIOR_WEIGHT * (((free - prior) / sigma) ** 2).sum())


def jacobian(problem: Problem, parameters: Sequence[Parameter], free: FloatArray, base: FloatArray) -> FloatArray:
    """Slopes of the residuals. A constant at its upper bound is moved inwards: outwards nothing would change, and the
    rows would seem to say nothing about it."""
    columns: list[FloatArray] = []
    for index, parameter in enumerate(parameters):
        moved = free.copy()
        step = STEP if free[index] + STEP <= parameter.highest else -STEP
        moved[index] += step
        columns.append((problem.residuals(Constants.of(parameters, moved), parameter, base) - base) / step)
    return np.stack(columns, axis=1)


def within(parameters: Sequence[Parameter], free: FloatArray) -> FloatArray:
    """The vector held inside the bounds of its constants."""
    low, high = (np.array([getattr(p, end) for p in parameters]) for end in ("lowest", "highest"))
    return np.clip(free, low, high)


def solve(
    problem: Problem,
    parameters: Sequence[Parameter],
    start: FloatArray,
    prior: FloatArray,
    scale: FloatArray,
    iterations: int = 8,
    say: Callable[[str], None] = lambda _: None,
) -> Solution:
    """Minimise from `start`, pulled to `prior`."""
    sigma = np.array([p.range.prior_sigma for p in parameters])
    free = within(parameters, start)
    base = problem.residuals(Constants.of(parameters, free))
    cost = loss(base, problem.weight, scale) + prior_cost(free, prior, sigma)
    damping = 1.0
    slope = jacobian(problem, parameters, free, base)
    for turn in range(iterations):
        improved = False
        for _ in range(5):
            step = gauss_newton(slope, base, problem.weight, scale, free, prior, sigma, damping)
            trial = within(parameters, free + step)
            residuals = problem.residuals(Constants.of(parameters, trial))
            found = loss(residuals, problem.weight, scale) + prior_cost(trial, prior, sigma)
            if found < cost:
                improved = True
                break
            damping *= 4.0
        if not improved:
            break
        gain = cost - found
        free, base, cost, damping = trial, residuals, found, max(damping / 4.0, 1e-3)
        say(f"turn {turn}: cost {cost:.1f}, gain {gain:.2f}")
        if gain < CONVERGED * abs(cost):
            break
        slope = jacobian(problem, parameters, free, base)
    return Solution(free, base, slope, _errors(slope, base, problem.weight, scale, sigma))


def gauss_newton(
    slope: FloatArray,
    base: FloatArray,
    weight: FloatArray,
    scale: FloatArray,
    free: FloatArray,
    prior: FloatArray,
    sigma: FloatArray,
    damping: float,
) -> FloatArray:
    """One damped step of the reweighted normal equations."""
    w = robust_weight(base, weight, scale)
    pull = 2 * PRIOR_WEIGHT / sigma**2
    normal = slope.T @ (w[:, None] * slope) + np.diag(pull + damping)
    gradient = slope.T @ (w * base) + pull * (free - prior)
    return np.clip(-np.linalg.solve(normal, gradient), -1.5, 1.5)


def _errors(
    slope: FloatArray, base: FloatArray, weight: FloatArray, scale: FloatArray, sigma: FloatArray
) -> FloatArray:
    w = robust_weight(base, weight, scale)
    normal = slope.T @ (w[:, None] * slope) + np.diag(2 * PRIOR_WEIGHT / sigma**2)
    return np.sqrt(np.diag(np.linalg.inv(normal)))
