"""Predicted against measured as a small SVG: logarithmic axes, the diagonal, a band around it, a colour per group.

In: named points. Out: SVG text. Written here to spare the project a plotting package for four pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

SIDE, LEFT, BOTTOM, TOP, RIGHT = 420, 62, 46, 34, 170
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8e5ea2", "#c98a1b", "#4a4a4a", "#17a2b8", "#b5651d")
BAND = 0.10

Points = Sequence[tuple[float, float]]
Place = Callable[[float, float], tuple[float, float]]


def scatter(groups: Mapping[str, Points], title: str, unit: str) -> str:
    """(measured, predicted) points by group; groups beyond the colours share the last one."""
    every = [value for points in groups.values() for pair in points for value in pair if value > 0]
    low, high = math.floor(math.log10(min(every)) * 4) / 4, math.ceil(math.log10(max(every)) * 4) / 4

    def place(value: float) -> float:
        return (math.log10(max(value, 10**low)) - low) / max(high - low, 1e-9) * SIDE

    def at(measured: float, predicted: float) -> tuple[float, float]:
        return LEFT + place(measured), TOP + SIDE - place(predicted)

    parts = [_frame(title, unit, low, high, at)]
    for number, (name, points) in enumerate(groups.items()):
        colour = COLOURS[min(number, len(COLOURS) - 1)]
        marks = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in (at(*pair) for pair in points if min(pair) > 0))
        parts.append(f'<path d="{marks}" stroke="{colour}" class="p"/>')
        y = TOP + 12 + 16 * number
        parts.append(f'<path d="M{LEFT + SIDE + 14} {y}h0" stroke="{colour}" class="k"/>')
        parts.append(f'<text x="{LEFT + SIDE + 24}" y="{y + 4}">{escape(name)} ({len(points)})</text>')
    return "\n".join([*parts, "</svg>\n"])


def _frame(title: str, unit: str, low: float, high: float, place: Place) -> str:
    """Axes with a line per power of ten, the diagonal and the band."""
    width, height = LEFT + SIDE + RIGHT, TOP + SIDE + BOTTOM
    ends = 10**low, 10**high
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        "<style>text{font:12px sans-serif;fill:#333}"
        ".p{stroke-width:3;stroke-linecap:round;stroke-opacity:.55;fill:none}"
        ".k{stroke-width:9;stroke-linecap:round}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<rect x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#999"/>',
        f'<text x="{LEFT}" y="{TOP - 12}" style="font-weight:bold">{escape(title)}</text>',
        f'<text x="{LEFT + SIDE / 2}" y="{height - 8}" text-anchor="middle">measured, {escape(unit)}</text>',
        f'<text transform="translate(14 {TOP + SIDE / 2}) rotate(-90)" text-anchor="middle">predicted</text>',
        f'<clipPath id="c"><rect x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}"/></clipPath>',
    ]
    for ratio, style in ((1.0, "#333"), (1 + BAND, "#bbb"), (1 / (1 + BAND), "#bbb")):
        (x, y), (u, v) = (place(end, end * ratio) for end in ends)
        lines.append(
            f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{u:.1f}" y2="{v:.1f}" stroke="{style}" clip-path="url(#c)"/>'
        )
    for power in range(math.ceil(low), math.floor(high) + 1):
        label = f"{10.0**power:g}"
        (x, _), (_, y) = place(10.0**power, ends[0]), place(ends[0], 10.0**power)
        lines.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{TOP + SIDE}" stroke="#eee"/>')
        lines.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{LEFT + SIDE}" y2="{y:.1f}" stroke="#eee"/>')
        lines.append(f'<text x="{x:.1f}" y="{TOP + SIDE + 16}" text-anchor="middle">{label}</text>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    return "\n".join(lines)
