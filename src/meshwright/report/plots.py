"""Plots made of characters, for a terminal or a log: lines over a logarithmic axis, scattered points, bars.

In: named series of (x, y). Out: text. Written here because the one plotting package for terminals keeps a global
figure and changed its whole interface between two releases (docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

MARKS = "●○▲△■□◆◇"


@dataclass(frozen=True)
class Series:
    """Points of one name, drawn with one mark; `joined` draws the line between them."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    joined: bool = True


@dataclass(frozen=True)
class Axis:
    """The scale of one axis: where a value lies between 0 and 1, and the labels at its ends."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high, at = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return (at - low) / (high - low) if high > low else 0.5


def plot(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    y_from: float | None = None,
    width: int = 72,
    height: int = 16,
    ticks: Sequence[float] = (),
) -> str:
    """The series on one canvas with their legend. Points that are not finite are left out."""
    points = [(x, y) for s in series for x, y in zip(s.x, s.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return f"(no {y_label} to plot)"
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_axis = Axis(min(xs), max(xs), log_x)
    y_axis = Axis(min(ys) if y_from is None else min(y_from, *ys), max(ys))
    canvas = [[" "] * width for _ in range(height)]
    for number, one in reversed(list(enumerate(series))):  # the first series lies on top
        _draw(canvas, one, MARKS[number % len(MARKS)], x_axis, y_axis)
    frame = _frame(canvas, y_axis)
    labels = _x_labels(x_axis, ticks or (x_axis.low, x_axis.high), len(frame[-1]) - width, width)
    return "\n".join([y_label, *frame, labels, _legend(series, x_label)])


def bars(parts: Sequence[tuple[str, float, str]], width: int = 40) -> str:
    """One line per part (name, value, text): a bar as long as its share of the largest."""
    largest = max((value for _, value, _ in parts), default=0.0) or 1.0
    names = max((len(name) for name, _, _ in parts), default=0)
    return "\n".join(f"{name:<{names}}  {_bar(value / largest, width):<{width}}  {text}" for name, value, text in parts)


def _bar(share: float, width: int) -> str:
    """Eighths of a cell make short bars comparable."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")


def _draw(canvas: list[list[str]], one: Series, mark: str, x_axis: Axis, y_axis: Axis) -> None:
    height, width = len(canvas), len(canvas[0])
    cells = [
        (round(x_axis.place(x) * (width - 1)), round((1 - y_axis.place(y)) * (height - 1)))
        for x, y in zip(one.x, one.y, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    if one.joined:
        for (column, row), (next_column, next_row) in pairwise(cells):
            for step in range(column + 1, next_column):
                at = row + round((next_row - row) * (step - column) / (next_column - column))
                if canvas[at][step] == " ":
                    canvas[at][step] = "·"
    for column, row in cells:
        canvas[row][column] = mark


def _frame(canvas: list[list[str]], axis: Axis) -> list[str]:
    """The canvas behind its y axis, labelled at five heights; every line starts with a margin of equal width."""
    last = len(canvas) - 1
    rows = {round(last * quarter / 4) for quarter in range(5)}
    # from the low end, which is then exact: what subtraction leaves of zero is no label
    labels = {row: _tick(axis.low + (axis.high - axis.low) * (last - row) / max(last, 1)) for row in rows}
    margin = max(len(label) for label in labels.values())
    lines = [f"{labels.get(row, ''):>{margin}} ┤{''.join(cells).rstrip()}" for row, cells in enumerate(canvas)]
    return [*lines, f"{'':>{margin}} └" + "─" * len(canvas[0])]


def _x_labels(axis: Axis, ticks: Sequence[float], margin: int, width: int) -> str:
    """The ticks under their columns; one that would run into its neighbour is left out."""
    line = [" "] * (margin + width + 12)
    end = 0
    for tick in ticks:
        text = _tick(tick)
        start = max(0, margin + round(axis.place(tick) * (width - 1)) - (len(text) - 1) // 2)
        if start >= end:
            line[start : start + len(text)] = text
            end = start + len(text) + 1
    return "".join(line).rstrip()


def _legend(series: Sequence[Series], x_label: str) -> str:
    marks = "   ".join(f"{MARKS[i % len(MARKS)]} {one.name}" for i, one in enumerate(series))
    return f"{x_label}     {marks}"


def _tick(value: float) -> str:
    if abs(value) >= 10_000 and value % 1000 == 0:
        return f"{value / 1000:,.0f}k"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
