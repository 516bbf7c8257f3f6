"""Does the model rank configurations rightly? Within a sweep - same family, model, devices, batch, sequence, format -
only the split differs, and choosing it is what a planner is for.

In: scored rows. Out: `SweepMetrics`: Kendall's tau-b of predicted against measured speed, and regret: by how much the
measured speed of the configuration predicted fastest falls short of the best measured one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.validation.scored import ScoredRow

FEWEST_ROWS = 3
TIED = 1e-9
"""Predictions this close, as a share, are the same: they differ by rounding."""


@dataclass(frozen=True)
class SweepMetrics:
    """Means over sweeps of at least three rows; None where there is none."""

    sweeps: int
    rows: int
    kendall_tau: float | None = None
    median_kendall_tau: float | None = None
    regret: float | None = None
    worst_regret: float | None = None

    @classmethod
    def of(cls, rows: Iterable[ScoredRow]) -> SweepMetrics:
        speeds = [s for s in _sweeps(rows).values() if len(s) >= FEWEST_ROWS]
        if not speeds:
            return cls(0, 0)
        columns = [np.array(s).T for s in speeds]
        taus = np.array([kendall_tau(measured, predicted) for measured, predicted in columns])
        regrets = np.array([regret(measured, predicted) for measured, predicted in columns])
        return cls(
            sweeps=len(speeds),
            rows=sum(len(s) for s in speeds),
            kendall_tau=float(taus.mean()),
            median_kendall_tau=float(np.median(taus)),
            regret=float(regrets.mean()),
            worst_regret=float(regrets.max()),
        )


def _sweeps(rows: Iterable[ScoredRow]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(measured, predicted) speeds of each sweep."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row.rate is not None and row.group.sweep:
            key = (row.group.family, row.group.sweep)
            found.setdefault(key, []).append((row.rate.measured, row.rate.predicted))
    return found


def kendall_tau(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Tau-b (Kendall 1945): agreeing less disagreeing pairs, over the pairs that are not tied in either; 0 where all
    are tied."""
    upper = np.triu_indices(len(first), 1)
    a = np.sign(np.subtract.outer(first, first)[upper])
    b = np.sign(np.subtract.outer(second, second)[upper])
    untied = np.sqrt(float((a != 0).sum()) * float((b != 0).sum()))
    return float((a * b).sum() / untied) if untied else 0.0


def regret(measured: NDArray[np.float64], predicted: NDArray[np.float64]) -> float:
    """Share of the best measured speed that the predicted best gives away; where several are predicted alike, the mean
    of choosing any of them."""
    chosen = predicted >= predicted.max() * (1.0 - TIED)
    return float((1.0 - measured[chosen] / measured.max()).mean())
