"""Scored rows with other predictions in place of the shipped ones, and tables of their errors in Markdown.

In: a `ValidationReport`'s rows and predicted rates per row id. Out: rows, `Line`s of metrics, text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from meshwright.validation.metrics import ErrorMetrics
from meshwright.validation.scored import Pair, ScoredRow
from meshwright.validation.sweeps import SweepMetrics

Key = Callable[[ScoredRow], str]


def repredicted(rows: Iterable[ScoredRow], rate: Mapping[str, float]) -> list[ScoredRow]:
    """The rows that have a measured rate and one in `rate`, which replaces the prediction."""
    return [
        replace(row, rate=Pair(row.rate.measured, rate[row.group.id]), predicted_rate=rate[row.group.id])
        for row in rows
        if row.rate is not None and row.group.id in rate
    ]


@dataclass(frozen=True)
class Line:
    """One group of rows: errors of the rate, ranking within sweeps."""

    name: str
    error: ErrorMetrics
    sweeps: SweepMetrics

    @classmethod
    def of(cls, name: str, rows: Sequence[ScoredRow]) -> Line:
        return cls(name, ErrorMetrics.of(row.rate for row in rows), SweepMetrics.of(rows))


def grouped(rows: Iterable[ScoredRow], key: Key) -> dict[str, list[ScoredRow]]:
    found: dict[str, list[ScoredRow]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return dict(sorted(found.items()))


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def error_cells(error: ErrorMetrics) -> list[str]:
    return [str(error.n), *(percent(v) for v in (error.median_ape, error.mape, error.p90_ape, error.bias))]


def sweep_cells(sweeps: SweepMetrics) -> list[str]:
    """Number of sweeps, mean and median of Kendall's tau, mean of regret."""
    if not sweeps.sweeps or sweeps.kendall_tau is None or sweeps.median_kendall_tau is None:
        return ["", "", ""]
    tau = f"{sweeps.kendall_tau:.2f} ({sweeps.median_kendall_tau:.2f})"
    return [str(sweeps.sweeps), tau, percent(sweeps.regret)]


ERROR_COLUMNS = ("n", "median", "mean", "p90", "bias")
SWEEP_COLUMNS = ("sweeps", "tau mean (median)", "regret")


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def table(lines: Iterable[Line], first: str = "rows") -> str:
    return markdown(
        [first, *ERROR_COLUMNS, *SWEEP_COLUMNS],
        [[line.name, *error_cells(line.error), *sweep_cells(line.sweeps)] for line in lines],
    )
