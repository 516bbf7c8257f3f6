"""The spread that measurements show around predictions, as the cost model reports it with every estimate.

In: scored rows by fit. Out: the text of src/meshwright/cost/data/spread.toml: measured over predicted, the shares
between which four of five runs lie. `known`: other runs of the same devices and software (cross-validated). `unknown`:
families left out whole. A family weighs by the square root of its rows: a sweep of hundreds is one piece of software.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np
from numpy.typing import NDArray

from meshwright.validation.scored import Pair, ScoredRow

LOW, HIGH = 0.1, 0.9
FITS = {"known": "cross-validated", "unknown": "leave one family out"}
TIERS = "AB"
"""Runs of tier B have a knob or two that their source does not state. They are counted too: of tier A alone the range
held four of five runs of tier A and two of three of tier B."""
KINDS = ("dense", "moe")
Sample = tuple[list[ScoredRow], list[float]]
"""Rows, and measured over predicted of each."""


def spread_toml(training: Mapping[str, Sequence[ScoredRow]], memory: Sequence[ScoredRow]) -> str:
    """The data file."""
    lines = [
        "# Spread of measured over predicted, written by `make accuracy`; never edited by hand.",
        f'date = "{date.today().isoformat()}"',
    ]
    for kind in KINDS:
        lines += ["", f"[step.{kind}]  # seconds of a step, tiers {TIERS}"]
        for name, fit in FITS.items():
            rows, ratios = steps(training, kind, fit)
            low, high = quantiles(rows, ratios)
            lines.append(f"{name} = [{low:.4f}, {high:.4f}]  # {len(rows)} runs, {fit}")
    rows, ratios = memories(memory)
    low, high = quantiles(rows, ratios)
    lines += ["", "[memory]  # peak bytes", f"all = [{low:.4f}, {high:.4f}]  # {len(rows)} runs"]
    return "\n".join(lines) + "\n"


def steps(training: Mapping[str, Sequence[ScoredRow]], kind: str, fit: str) -> Sample:
    """Seconds of a step of one architecture under one fit."""
    rows = [r for r in training[fit] if r.group.tier in TIERS and r.group.architecture == kind]
    return rows, [1 / _ratio(r.rate) for r in rows]


def memories(memory: Sequence[ScoredRow]) -> Sample:
    """Peak bytes."""
    rows = [r for r in memory if r.memory is not None and r.group.tier in TIERS]
    return rows, [_ratio(r.memory) for r in rows]


@dataclass(frozen=True)
class Coverage:
    """A range, the share of runs inside it, and inside the range that the other families alone would have set: both
    weighed as the range is, and the latter run by run."""

    n: int
    range: tuple[float, float]
    inside: float
    inside_of_others: float
    runs_inside_of_others: float

    @classmethod
    def of(cls, rows: Sequence[ScoredRow], ratios: Sequence[float]) -> Coverage:
        families = np.array([row.group.family for row in rows])
        measured, weight = np.array(ratios), _weights(rows)
        low, high = quantiles(rows, ratios)
        others = np.zeros(len(rows), dtype=np.bool_)
        for name in np.unique(families):
            rest = np.flatnonzero(families != name).tolist()
            if not rest:
                raise ValueError(f"no family but {name}: a range needs others")
            least, most = quantiles([rows[i] for i in rest], measured[rest].tolist())
            out = families == name
            others[out] = (least <= measured[out]) & (measured[out] <= most)
        inside = (low <= measured) & (measured <= high)
        return cls(
            n=len(rows),
            range=(low, high),
            inside=float(weight[inside].sum() / weight.sum()),
            inside_of_others=float(weight[others].sum() / weight.sum()),
            runs_inside_of_others=float(others.mean()),
        )


def coverages(training: Mapping[str, Sequence[ScoredRow]], memory: Sequence[ScoredRow]) -> dict[str, Coverage]:
    """Every range that an estimate may give, by what it is of."""
    found = {
        f"step, {kind}, {name} ({fit})": Coverage.of(*steps(training, kind, fit))
        for kind in KINDS
        for name, fit in FITS.items()
    }
    return {**found, "peak memory": Coverage.of(*memories(memory))}


def _ratio(pair: Pair | None) -> float:
    """Measured over predicted."""
    if pair is None:
        raise ValueError("a row without a measurement cannot be weighed")
    return pair.measured / pair.predicted


def quantiles(rows: Sequence[ScoredRow], ratios: Sequence[float]) -> tuple[float, float]:
    """The weighted shares LOW and HIGH of ratios."""
    weight, order = _weights(rows), np.argsort(ratios)
    below = (np.cumsum(weight[order]) - 0.5 * weight[order]) / weight.sum()
    low, high = np.interp([LOW, HIGH], below, np.array(ratios)[order])
    return float(low), float(high)


def _weights(rows: Sequence[ScoredRow]) -> NDArray[np.float64]:
    size = Counter(row.group.family for row in rows)
    return np.array([size[row.group.family] ** -0.5 for row in rows])
