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
TRIES, LEAST_DAMPING = 5, 1e-3
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


@dataclass(frozen=True)
class Target:
    """What is minimised over a free vector: sum w rho(residuals) + the pull to a prior. `slope` takes the vector and
    the residuals there, `within` holds a vector inside its bounds."""

    residuals: Callable[[FloatArray], FloatArray]
    slope: Callable[[FloatArray, FloatArray], FloatArray]
    within: Callable[[FloatArray], FloatArray]
    weight: FloatArray
    scale: FloatArray
    prior: FloatArray
    sigma: FloatArray

    def cost(self, free: FloatArray, residuals: FloatArray) -> float:
        return loss(residuals, self.weight, self.scale) + prior_cost(free, self.prior, self.sigma)

    def step(self, slope: FloatArray, free: FloatArray, residuals: FloatArray, damping: float) -> FloatArray:
        return gauss_newton(slope, residuals, self.weight, self.scale, free, self.prior, self.sigma, damping)


def minimise(
    target: Target, start: FloatArray, turns: int, enough: float, say: Callable[[str], None] = lambda _: None
) -> Solution:
    """Levenberg-Marquardt from `start`, until a turn lowers the cost by less than the share `enough` of it."""
    free = target.within(start)
    base = target.residuals(free)
    cost, damping = target.cost(free, base), 1.0
    slope = target.slope(free, base)
    for turn in range(turns):
        before = cost
        for _ in range(TRIES):
            trial = target.within(free + target.step(slope, free, base, damping))
            residuals = target.residuals(trial)
            found = target.cost(trial, residuals)
            if found < cost:
                free, base, cost, damping = trial, residuals, found, max(damping / 4.0, LEAST_DAMPING)
                break
            damping *= 4.0
        if cost == before:
            break
        say(f"turn {turn}: cost {cost:.1f}, gain {before - cost:.2f}")
        if before - cost < enough * abs(before):
            break
        slope = target.slope(free, base)
    return Solution(free, base, slope, _errors(slope, base, target.weight, target.scale, target.sigma))


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
    target = Target(
        residuals=lambda free: problem.residuals(Constants.of(parameters, free)),
        slope=lambda free, base: jacobian(problem, parameters, free, base),
        within=lambda free: within(parameters, free),
        weight=problem.weight,
        scale=scale,
        prior=prior,
        sigma=np.array([p.range.prior_sigma for p in parameters]),
    )
    return minimise(target, start, iterations, CONVERGED, say)


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
