"""Robust least squares on the offsets of traits: Levenberg-Marquardt with a numerical Jacobian, a prior at zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from tools.calibrate.solve import Solution, gauss_newton, loss, prior_cost, robust_weight
from tools.calibrate_serving.problem import Problem
from tools.calibrate_serving.traits import FloatArray, Parameter, engines

PRIOR_WEIGHT = 0.3
STEP = 0.03


def jacobian(problem: Problem, chosen: Sequence[Parameter], offsets: FloatArray, base: FloatArray) -> FloatArray:
    columns: list[FloatArray] = []
    for index, parameter in enumerate(chosen):
        moved = offsets.copy()
        moved[index] += STEP
        up = problem.residuals(engines(chosen, moved), parameter, base) - base
        moved[index] -= 2 * STEP
        down = problem.residuals(engines(chosen, moved), parameter, base) - base
        columns.append((up - down) / (2 * STEP))
    return np.stack(columns, axis=1)


def solve(
    problem: Problem,
    chosen: Sequence[Parameter],
    weight: FloatArray,
    scale: FloatArray,
    iterations: int = 8,
    start: FloatArray | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Solution:
    sigma = np.array([p.sigma for p in chosen])
    prior = np.zeros(len(chosen))
    free = prior.copy() if start is None else start.copy()
    base = problem.residuals(engines(chosen, free))
    cost = loss(base, weight, scale) + prior_cost(free, prior, sigma)
    damping = 1.0
    slope = jacobian(problem, chosen, free, base)
    for turn in range(iterations):
        improved = False
        for _ in range(5):
            trial = free + gauss_newton(slope, base, weight, scale, free, prior, sigma, damping)
            residuals = problem.residuals(engines(chosen, trial))
            found = loss(residuals, weight, scale) + prior_cost(trial, prior, sigma)
            if found < cost:
                improved = True
                break
            damping *= 4.0
        if not improved:
            break
        gain = cost - found
        free, base, cost, damping = trial, residuals, found, max(damping / 4.0, 1e-3)
        say(f"turn {turn}: cost {cost:.1f}, gain {gain:.2f}")
        if gain < 1e-3 * abs(cost):
            break
        slope = jacobian(problem, chosen, free, base)
    w = robust_weight(base, weight, scale)
    normal = slope.T @ (w[:, None] * slope) + np.diag(2 * PRIOR_WEIGHT / sigma**2)
    return Solution(free, base, slope, np.sqrt(np.diag(np.linalg.inv(normal))))
