"""The result of a validation: every row's outcome, and metrics over all rows and over groups of them.

`to_json_dict` is the document that `meshwright validate --json` prints; `table` is for people.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from meshwright.validation.metrics import FitMetrics, Metrics
from meshwright.validation.scored import Pair, ScoredRow, SkippedRow
from meshwright.validation.sweeps import SweepMetrics


@dataclass(frozen=True)
class TableRow:
    """A line of the summary: a group of rows and its metrics."""

    name: str
    metrics: Metrics


@dataclass(frozen=True)
class ValidationReport:
    """Scored rows in file order, and those skipped with the reason."""

    file: str
    scored: tuple[ScoredRow, ...]
    skipped: tuple[SkippedRow, ...]

    @property
    def rows(self) -> int:
        return len(self.scored) + len(self.skipped)

    @property
    def metrics(self) -> Metrics:
        return Metrics.of(self.scored)

    def grouped(self, key: Callable[[ScoredRow], str]) -> dict[str, Metrics]:
        """Metrics of the rows that share a key, by key."""
        members: dict[str, list[ScoredRow]] = {}
        for row in self.scored:
            members.setdefault(key(row), []).append(row)
        return {name: Metrics.of(members[name]) for name in sorted(members)}

    def by_family(self) -> dict[str, Metrics]:
        return self.grouped(lambda row: row.group.family)

    def by_tier(self) -> dict[str, Metrics]:
        return self.grouped(lambda row: row.group.tier)

    def by_architecture(self) -> dict[str, Metrics]:
        return self.grouped(lambda row: row.group.architecture)

    def by_tier_and_architecture(self) -> dict[str, Metrics]:
        return self.grouped(lambda row: f"{row.group.tier} {row.group.architecture}")

    @property
    def sweeps(self) -> SweepMetrics:
        """How well configurations are ranked, over all sweeps."""
        return SweepMetrics.of(self.scored)

    def sweeps_by_family(self) -> dict[str, SweepMetrics]:
        """The same by family; families without a sweep are left out."""
        families = sorted({row.group.family for row in self.scored})
        every = {f: SweepMetrics.of(row for row in self.scored if row.group.family == f) for f in families}
        return {family: metrics for family, metrics in every.items() if metrics.sweeps}

    def skip_reasons(self) -> dict[str, int]:
        """How many rows were skipped for each reason, the commonest first."""
        counts: dict[str, int] = {}
        for row in self.skipped:
            counts[row.reason] = counts.get(row.reason, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def table(self) -> tuple[TableRow, ...]:
        """Lines for people: all rows, then by tier and architecture, then families."""
        groups = {"all": self.metrics, **self.by_tier_and_architecture(), **self.by_family()}
        return tuple(TableRow(name, metrics) for name, metrics in groups.items())

    def to_json_dict(self) -> dict[str, Any]:
        """One JSON document; errors are fractions, memory is GiB."""

        def named(groups: dict[str, Metrics]) -> dict[str, Any]:
            return {name: _metrics(metrics) for name, metrics in groups.items()}

        return {
            "file": self.file,
            "rows": self.rows,
            "scored": len(self.scored),
            "skipped": [asdict(row) for row in self.skipped],
            "metrics": _metrics(self.metrics),
            "groups": named(self.by_family()),
            "tiers": named(self.by_tier()),
            "architectures": named(self.by_architecture()),
            "tier_architectures": named(self.by_tier_and_architecture()),
            "sweeps": asdict(self.sweeps) | {"groups": {f: asdict(m) for f, m in self.sweeps_by_family().items()}},
            "per_row": [_row(row) for row in self.scored],
        }


def _metrics(metrics: Metrics) -> dict[str, Any]:
    return {
        "tokens_per_s_per_gpu": asdict(metrics.rate),
        "peak_mem_gib": asdict(metrics.memory),
        "oom": _fit(metrics.fit),
    }


def _fit(fit: FitMetrics) -> dict[str, Any]:
    return {"n": fit.n, **asdict(fit), "accuracy": fit.accuracy, "false_fit_rate": fit.false_fit_rate}


def _row(row: ScoredRow) -> dict[str, Any]:
    """`measured`, `predicted` and `ape` at the top are tokens/s per GPU."""
    return {
        **{name: value for name, value in asdict(row.group).items() if name != "sweep"},
        "measured": row.rate.measured if row.rate else None,
        "predicted": row.predicted_rate,
        "ape": row.rate.ape if row.rate else None,
        "peak_mem_gib": {"measured": None, "predicted": row.predicted_gib, "ape": None} | _pair(row.memory),
        "oom": {"ran": row.ran, "predicted_fit": row.fits},
        "assumed": list(row.assumed),
    }


def _pair(pair: Pair | None) -> dict[str, float]:
    return {"measured": pair.measured, "predicted": pair.predicted, "ape": pair.ape} if pair else {}
