"""Character plots."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from meshwright.report.plots import Series, bars, plot


def test_points_of_a_falling_series_step_down_from_left_to_right() -> None:
    text = plot([Series("s", [8, 64, 512], [3.0, 2.0, 1.0], joined=False)], x_label="GPUs", y_label="y", log_x=True)
    rows = [(line.index("●"), number) for number, line in enumerate(text.splitlines()[:-1]) if "●" in line]
    columns = [column for column, _ in rows]
    assert len(rows) == 3
    assert columns == sorted(columns)
    assert abs((columns[1] - columns[0]) - (columns[2] - columns[1])) <= 1  # equal ratios, equal distances


def test_every_line_of_the_canvas_starts_at_the_same_margin() -> None:
    lines = plot([Series("s", [1, 2], [0, 12345])], x_label="x", y_label="y").splitlines()[1:-3]
    assert len({line.index("┤") for line in lines}) == 1


def test_an_axis_that_starts_at_nothing_is_labelled_nothing() -> None:
    """690.3 - 690.3 * 13 / 13 was printed as 1.14e-13."""
    for top in (690.3, 648.7, 0.1 + 0.2):
        text = plot([Series("s", [1, 2], [1.0, top])], x_label="x", y_label="y", y_from=0.0, height=14)
        assert text.splitlines()[14].split()[0] == "0"


def test_a_plot_without_finite_points_says_so() -> None:
    assert "no speed to plot" in plot([Series("s", [1.0], [math.inf])], x_label="x", y_label="speed")


@given(st.lists(st.tuples(st.floats(1, 1e9), st.floats(-1e9, 1e9)), min_size=1, max_size=30))
def test_any_finite_points_can_be_drawn(points: list[tuple[float, float]]) -> None:
    points.sort()
    series = Series("s", [x for x, _ in points], [y for _, y in points])
    text = plot([series], x_label="x", y_label="y", log_x=True, width=30, height=5)
    assert "●" in text


def test_bars_are_as_long_as_their_share_of_the_largest() -> None:
    longest, half, none = bars([("a", 2.0, "2"), ("bb", 1.0, "1"), ("c", 0.0, "0")], width=10).splitlines()
    assert (longest.count("█"), half.count("█"), none.count("█")) == (10, 5, 0)
