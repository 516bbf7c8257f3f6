"""The spread of measured over predicted: quantiles of known samples, families weighed by the root of their rows."""

from __future__ import annotations

import tomllib

import pytest
from tools.accuracy.spread import Coverage, quantiles, spread_toml

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


def test_a_family_does_not_vouch_for_itself() -> None:
    rows = [row(family, 1.0) for family in "abcde" for _ in range(40)]
    ratios = [1.0 + (i % 40) / 400 for i in range(160)] + [3.0] * 40
    found = Coverage.of(rows, ratios)
    assert found.inside > 0.8
    assert found.inside_of_others == pytest.approx(found.runs_inside_of_others)  # families of one size
    assert found.runs_inside_of_others < 0.75
    with pytest.raises(ValueError, match="needs others"):
        Coverage.of(rows[:40], ratios[:40])


def test_ranges_count_the_runs_whose_settings_are_partly_unknown() -> None:
    seen = [row("f", 1.0, tier="A")] * 5 + [row("g", 0.25, tier="B")] * 5
    every = [*seen, *[row("g", 0.8, "moe", "B")] * 5]
    read = tomllib.loads(spread_toml({"cross-validated": every, "leave one family out": every}, every))
    assert read["step"]["dense"]["known"] == pytest.approx([1.0, 4.0])
