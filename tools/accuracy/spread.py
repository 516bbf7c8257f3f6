"""The spread that measurements show around predictions, as the cost model reports it with every estimate.

In: scored rows by fit. Out: the text of src/meshwright/cost/data/spread.toml: measured over predicted, the shares
between which four of five runs lie. `known`: other runs of the same devices and software (cross-validated). `unknown`:
families left out whole. A family weighs by the square root of its rows: a sweep of hundreds is one piece of software.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date

import numpy as np

from meshwright.validation.scored import Pair, ScoredRow

LOW, HIGH = 0.1, 0.9
FITS = {"known": "cross-validated", "unknown": "leave one family out"}
TIERS = {"dense": "A", "moe": "AB"}
"""Tier A has nine runs of mixtures of experts: those of tier B are counted too."""


def spread_toml(training: Mapping[str, Sequence[ScoredRow]], memory: Sequence[ScoredRow]) -> str:
    """The data file."""
    lines = [
        "# Spread of measured over predicted, written by `make accuracy`; never edited by hand.",
        f'date = "{date.today().isoformat()}"',
    ]
    for kind, tiers in TIERS.items():
        lines += ["", f"[step.{kind}]  # seconds of a step, tiers {tiers}"]
        for name, fit in FITS.items():
            rows = [r for r in training[fit] if r.group.tier in tiers and r.group.architecture == kind]
            low, high = quantiles(rows, [1 / _ratio(r.rate) for r in rows])
            lines.append(f"{name} = [{low:.4f}, {high:.4f}]  # {len(rows)} runs, {fit}")
    rows = [r for r in memory if r.memory is not None and r.group.tier in "AB"]
    low, high = quantiles(rows, [_ratio(r.memory) for r in rows])
    lines += ["", "[memory]  # peak bytes", f"all = [{low:.4f}, {high:.4f}]  # {len(rows)} runs"]
    return "\n".join(lines) + "\n"


def _ratio(pair: Pair | None) -> float:
    """Measured over predicted."""
    if pair is None:
        raise ValueError("a row without a measurement cannot be weighed")
    return pair.measured / pair.predicted


def quantiles(rows: Sequence[ScoredRow], ratios: Sequence[float]) -> tuple[float, float]:
    """The weighted shares LOW and HIGH of ratios."""
    size = Counter(row.group.family for row in rows)
    weight = np.array([size[row.group.family] ** -0.5 for row in rows])
    order = np.argsort(ratios)
    below = (np.cumsum(weight[order]) - 0.5 * weight[order]) / weight.sum()
    low, high = np.interp([LOW, HIGH], below, np.array(ratios)[order])
    return float(low), float(high)
