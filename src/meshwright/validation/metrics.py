"""How good predictions are: error statistics of pairs, confusion counts of fit decisions. Fractions, not percent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.validation.scored import Pair, ScoredRow


@dataclass(frozen=True)
class ErrorMetrics:
    """Of absolute percentage errors: median, mean and 90th percentile. `bias` is the mean signed error (positive:
    predictions too high). None where there is nothing to score."""

    n: int
    median_ape: float | None = None
    mape: float | None = None
    p90_ape: float | None = None
    bias: float | None = None

    @classmethod
    def of(cls, pairs: Iterable[Pair | None]) -> ErrorMetrics:
        errors = np.array([pair.relative_error for pair in pairs if pair is not None])
        if not len(errors):
            return cls(0)
        ape = np.abs(errors)
        return cls(
            n=len(errors),
            median_ape=float(np.median(ape)),
            mape=float(ape.mean()),
            p90_ape=float(np.quantile(ape, 0.9)),
            bias=float(errors.mean()),
        )


@dataclass(frozen=True)
class FitMetrics:
    """Predicted against actual fit. `false_fits`: said to fit, ran out of memory. `false_fit_rate`: their share of the
    rows that ran out of memory."""

    true_fits: int
    false_fits: int
    true_oom: int
    false_oom: int

    @classmethod
    def of(cls, rows: Iterable[ScoredRow]) -> FitMetrics:
        judged = [(row.fits, row.ran) for row in rows if row.fits is not None and row.ran is not None]
        return cls(
            true_fits=judged.count((True, True)),
            false_fits=judged.count((True, False)),
            true_oom=judged.count((False, False)),
            false_oom=judged.count((False, True)),
        )

    @property
    def n(self) -> int:
        return self.true_fits + self.false_fits + self.true_oom + self.false_oom

    @property
    def accuracy(self) -> float | None:
        return (self.true_fits + self.true_oom) / self.n if self.n else None

    @property
    def false_fit_rate(self) -> float | None:
        actual_oom = self.false_fits + self.true_oom
        return self.false_fits / actual_oom if actual_oom else None


@dataclass(frozen=True)
class Metrics:
    """All metrics of a set of rows."""

    rate: ErrorMetrics
    memory: ErrorMetrics
    fit: FitMetrics

    @classmethod
    def of(cls, rows: Sequence[ScoredRow]) -> Metrics:
        return cls(
            rate=ErrorMetrics.of(row.rate for row in rows),
            memory=ErrorMetrics.of(row.memory for row in rows),
            fit=FitMetrics.of(rows),
        )
