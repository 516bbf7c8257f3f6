"""Error statistics by hand."""

from __future__ import annotations

import pytest

from meshwright.validation.metrics import ErrorMetrics
from meshwright.validation.scored import Pair


def test_error_metrics_are_fractions_of_the_measured_value() -> None:
    metrics = ErrorMetrics.of([Pair(100, 110), Pair(100, 80), None, Pair(10, 10), Pair(50, 75)])
    assert metrics.n == 4
    assert metrics.median_ape == pytest.approx(0.15)
    assert metrics.mape == pytest.approx((0.1 + 0.2 + 0.0 + 0.5) / 4)
    assert metrics.p90_ape == pytest.approx(0.2 + 0.7 * 0.3)
    assert metrics.bias == pytest.approx((0.1 - 0.2 + 0.0 + 0.5) / 4)


def test_nothing_scored_gives_no_numbers() -> None:
    assert ErrorMetrics.of([None]) == ErrorMetrics(0, None, None, None, None)
