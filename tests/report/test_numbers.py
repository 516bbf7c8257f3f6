"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from meshwright.report.numbers import billions, gib, percent, seconds, size


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 s"), (8e-6, "8.00 us"), (0.0412, "41.2 ms"), (2.345, "2.35 s"), (119.6, "120 s"), (200, "3 min 20 s")],
)
def test_seconds_keep_three_digits_at_their_natural_scale(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (1536, "1.50 KiB"), (2**29, "512 MiB"), (3 * 2**40, "3.00 TiB")]
)
def test_sizes_carry_binary_units(value: float, text: str) -> None:
    assert size(value) == text


def test_what_is_not_finite_is_shown_as_a_dash() -> None:
    assert {seconds(math.inf), size(math.nan), gib(math.inf), percent(math.nan)} == {"-"}


def test_gib_and_parameter_counts() -> None:
    assert (gib(2**30 * 63.25), billions(70_553_706_496), billions(124_439_808)) == ("63.2", "70.6 B", "124 M")
