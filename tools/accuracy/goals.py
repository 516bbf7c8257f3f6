"""The goals that the project set itself, each with the figure that was reached.

In: `Evidence`. Out: `Goal`s; a goal is met where every figure is on the right side of its bound.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tools.accuracy.evidence import Evidence
from tools.accuracy.scores import percent

from meshwright.validation.metrics import ErrorMetrics, FitMetrics
from meshwright.validation.scored import ScoredRow
from meshwright.validation.sweeps import SweepMetrics

GRID = "ultrascale-nanotron"


@dataclass(frozen=True)
class Figure:
    """A figure, its bound, and on which side of it lies well."""

    name: str
    value: float | None
    bound: float
    at_least: bool = False
    share: bool = True

    @property
    def met(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        value = "none" if self.value is None else percent(self.value) if self.share else f"{self.value:.2f}"
        return f"{self.name} {value}"

    @property
    def wanted(self) -> str:
        bound = f"{100 * self.bound:.0f} %" if self.share else f"{self.bound:g}"
        return f"{self.name} {'>=' if self.at_least else '<='} {bound}"


@dataclass(frozen=True)
class Goal:
    """What is scored, on how many rows, and how well."""

    what: str
    n: int
    figures: tuple[Figure, ...]

    @property
    def met(self) -> bool:
        return all(figure.met for figure in self.figures)

    def cells(self) -> list[str]:
        wanted = ", ".join(figure.wanted for figure in self.figures)
        reached = ", ".join(str(figure) for figure in self.figures)
        return [self.what, str(self.n), wanted, reached, "met" if self.met else "**missed**"]


def errors(what: str, error: ErrorMetrics, median: float | None = None, mean: float | None = None) -> Goal:
    """A goal on the median, the mean, or both."""
    figures: list[Figure] = []
    if median is not None:
        figures.append(Figure("median", error.median_ape, median))
    if mean is not None:
        figures.append(Figure("mean", error.mape, mean))
    return Goal(what, error.n, tuple(figures))


def rate_errors(rows: Iterable[ScoredRow]) -> ErrorMetrics:
    return ErrorMetrics.of(row.rate for row in rows)


def tier(rows: Iterable[ScoredRow], tiers: str, architecture: str = "") -> list[ScoredRow]:
    """Rows of some tiers ("AB"), of one architecture where it is given."""
    return [r for r in rows if r.group.tier in tiers and architecture in ("", r.group.architecture)]


def family(rows: Iterable[ScoredRow], name: str) -> list[ScoredRow]:
    return [row for row in rows if row.group.family == name]


def static(rows: Iterable[ScoredRow]) -> list[ScoredRow]:
    return [row for row in rows if "static_batch" in row.group.family]


def saturation(rows: Iterable[ScoredRow]) -> list[ScoredRow]:
    return [r for r in rows if r.group.family.endswith(" throughput")]


def confusion(evidence: Evidence, tiers: str) -> FitMetrics:
    """Fit decisions of the rows that ran and of those that did not."""
    return FitMetrics.of(tier([*evidence.report.scored, *evidence.oom.scored], tiers))


def goals(evidence: Evidence) -> list[Goal]:
    """Every goal, in the order in which they were set."""
    crossed, alone = evidence.training["cross-validated"], evidence.training["leave one family out"]
    grid = SweepMetrics.of(family(crossed, GRID))
    fit = confusion(evidence, "AB")
    memory = ErrorMetrics.of(row.memory for row in tier(evidence.report.scored, "AB"))
    served = evidence.served["cross-validated"]
    return [
        errors("tier A dense, cross-validated", rate_errors(tier(crossed, "A", "dense")), 0.05, 0.08),
        errors("tier A mixture of experts, cross-validated", rate_errors(tier(crossed, "A", "moe")), 0.12),
        errors("tier A dense, leave one family out", rate_errors(tier(alone, "A", "dense")), mean=0.15),
        errors("vtrain-multi, cross-validated", rate_errors(family(crossed, "vtrain-multi")), mean=0.08),
        errors("vtrain-single, cross-validated", rate_errors(family(crossed, "vtrain-single")), mean=0.12),
        Goal(
            f"{GRID} grid, tiers A and B, cross-validated: {grid.sweeps} sweeps",
            grid.rows,
            (
                Figure("Kendall tau", grid.kendall_tau, 0.8, at_least=True, share=False),
                Figure("regret", grid.regret, 0.03),
            ),
        ),
        errors("memory, tiers A and B", memory, 0.05, 0.08),
        Goal(
            "fits or does not, tiers A and B",
            fit.n,
            (
                Figure("right", fit.accuracy, 0.95, at_least=True),
                Figure("false fits of all decisions", fit.false_fits / fit.n if fit.n else None, 0.02),
            ),
        ),
        errors("serving, static batch, cross-validated", rate_errors(static(served)), mean=0.20),
        errors("serving, saturation throughput, cross-validated", rate_errors(saturation(served)), 0.07, 0.15),
    ]
