"""Training rows predicted three times over: by the constants as shipped, and by fits that have not seen the row.

In: a file of rows. Out: tokens/s per GPU per row id and fit (`Held`). Folds and re-solving are tools.calibrate's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tools.accuracy.store import kept, sources
from tools.calibrate.crossval import DAMPING, STEPS, folds
from tools.calibrate.parameters import Constants, Parameter, assumed, last_fit
from tools.calibrate.problem import FloatArray, Problem, groups
from tools.calibrate.relevant import relevant
from tools.calibrate.rows import Rows, load_rows
from tools.calibrate.solve import Solution, gauss_newton, jacobian

FOLDS = 5
FITS = ("fitted", "cross-validated", "leak groups apart", "leave one family out")
"""`fitted` are the constants as shipped. The others predict a row by a fit without its fold: five folds over
config_group, five over leak_group (the same layout at another scale or precision), and one fold per family."""

DEPENDS_ON = ("src/meshwright/cost", "src/meshwright/models", "src/meshwright/hardware", "src/meshwright/validation",
              "src/meshwright/schedules", "tools/calibrate")  # fmt: skip

Held = dict[str, dict[str, float]]
"""Fit -> row id -> predicted tokens/s per GPU."""


def held_out(path: Path, say: Callable[[str], None]) -> Held:
    """Predictions of every row of tiers A and B, from the store where the code, the constants and the rows are the
    same."""
    here = [Path(__file__), path, *sources(*DEPENDS_ON)]
    return kept("training", here, (), lambda: predict(path, say))


def predict(path: Path, say: Callable[[str], None]) -> Held:
    """The work of `held_out`: one Jacobian at the shipped constants, then a few steps per fold."""
    rows = load_rows(path)
    problem = Problem(groups(rows.cases), rows.measured_s, rows.weight)
    parameters = relevant(problem.groups)
    say(f"{len(rows)} training rows, {len(parameters)} constants")
    prior = assumed(parameters)
    whole = shipped(problem, parameters, say)
    names = sorted(set(rows.families))
    leaks = leak_groups(path)
    apart = {
        "cross-validated": folds(rows.config_groups, FOLDS),
        "leak groups apart": folds([leaks[i] for i in rows.ids], FOLDS),
        "leave one family out": np.array([names.index(f) for f in rows.families]),
    }
    residuals = {"fitted": whole.residuals}
    for name, fold in apart.items():
        say(name)
        residuals[name] = unseen(problem, parameters, whole, prior, rows.scale, fold, say)
    return {fit: dict(zip(rows.ids, rates(rows, r).tolist(), strict=True)) for fit, r in residuals.items()}


def unseen(
    problem: Problem,
    parameters: list[Parameter],
    whole: Solution,
    prior: FloatArray,
    scale: FloatArray,
    fold: NDArray[np.int64],
    say: Callable[[str], None],
) -> FloatArray:
    """Residual of every row from a fit without its fold. As `tools.calibrate.crossval.left_out`, but the rows that are
    seen follow the slopes of the whole fit while it is solved again, which saves nine tenths of the time; the rows that
    are not are priced anew."""
    sigma = np.array([p.range.prior_sigma for p in parameters])
    residuals = np.full(len(fold), np.nan)
    for name in np.unique(fold):
        out = fold == name
        weight = np.where(out, 0.0, problem.weight)
        free = whole.free
        for _ in range(STEPS):
            seen = whole.residuals + whole.jacobian @ (free - whole.free)
            free = free + gauss_newton(whole.jacobian, seen, weight, scale, free, prior, sigma, DAMPING)
        asked = replace(problem, groups=[group for group in problem.groups if out[group.rows].any()])
        residuals[out] = asked.residuals(Constants.of(parameters, free))[out]
        say(f"fold {name}: {out.sum()} rows, median error {np.median(np.abs(np.expm1(-residuals[out]))):.3f}")
    return residuals


def shipped(problem: Problem, parameters: list[Parameter], say: Callable[[str], None]) -> Solution:
    """The constants as shipped, as a solution that folds can start from."""
    free = last_fit(parameters)
    base = problem.residuals(Constants.of(parameters, free))
    say(f"shipped constants: median error {np.median(np.abs(np.exp(-base) - 1)):.3f}; slopes next")
    return Solution(free, base, jacobian(problem, parameters, free, base), np.zeros(len(free)))


def rates(rows: Rows, residuals: FloatArray) -> FloatArray:
    """Tokens/s per GPU of log(predicted / measured) seconds."""
    seconds = np.exp(residuals) * rows.measured_s
    tokens = [config.global_batch * workload.seq / config.world_size for _, _, workload, config, _ in rows.cases]
    return np.array(tokens) / seconds


def leak_groups(path: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {line["id"]: line.get("leak_group") or line.get("config_group") or line["id"] for line in lines}
