"""The spread of measured over predicted: quantiles of known samples, families weighed by the root of their rows."""

from __future__ import annotations

import tomllib

import pytest
from tools.accuracy.spread import quantiles, spread_toml

from meshwright.validation.scored import Group, Pair, ScoredRow


def row(family: str, measured: float, kind: str = "dense", tier: str = "A") -> ScoredRow:
    pair = Pair(measured, 1.0)
    return ScoredRow(Group("r", family, tier, kind), pair, pair, True, True, 1.0, 1.0, ())


def test_four_of_five_equal_rows_lie_between_the_quantiles() -> None:
    ratios = [1 + i / 100 for i in range(101)]
    low, high = quantiles([row("f", r) for r in ratios], ratios)
    assert (low, high) == pytest.approx((1.1, 1.9), abs=0.01)


def test_a_sweep_of_hundreds_does_not_drown_other_families() -> None:
    sweep, other = [row("sweep", 1.0)] * 400, [row("other", 2.0)] * 25
    assert quantiles(sweep + other, [1.0] * 400 + [2.0] * 25)[1] == pytest.approx(2.0, abs=0.01)


def test_the_file_holds_slower_steps_where_rates_were_lower() -> None:
    seen = [row("f", 0.8)] * 5 + [row("g", 0.8, "moe", "B")] * 5
    unseen = [row("f", 0.5)] * 5 + [row("g", 0.5, "moe", "B")] * 5
    read = tomllib.loads(spread_toml({"cross-validated": seen, "leave one family out": unseen}, seen))
    assert read["step"]["dense"]["known"] == pytest.approx([1.25, 1.25])
    assert read["step"]["moe"]["unknown"] == pytest.approx([2.0, 2.0])
    assert read["memory"]["all"] == pytest.approx([0.8, 0.8])
