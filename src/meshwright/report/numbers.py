"""Numbers as a person reads them: GiB, seconds at their natural scale, thousands grouped. In: SI numbers. Out: text."""

from __future__ import annotations

import math

GIB = 2**30


def gib(value: float) -> str:
    """Bytes as GiB with one decimal: '63.2'."""
    return f"{value / GIB:,.1f}" if math.isfinite(value) else "-"


def size(value: float) -> str:
    """Bytes with the unit that keeps three digits: '1.50 GiB', '512 MiB', '96 B'."""
    if not math.isfinite(value):
        return "-"
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= scale:
            return f"{_three_digits(value / scale)} {unit}"
    return f"{value:.0f} B"


def seconds(value: float) -> str:
    """'2.35 s', '41.0 ms', '8.00 us', '3 min 20 s'; infinite time is '-'."""
    if not math.isfinite(value):
        return "-"
    if value >= 120:
        return f"{int(value) // 60:,} min {value % 60:.0f} s"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{_three_digits(value / scale)} {unit}"
    return "0 s" if value == 0 else f"{value * 1e6:.2g} us"


def percent(share: float) -> str:
    """A fraction as '45.2 %'."""
    return f"{share * 100:.1f} %" if math.isfinite(share) else "-"


def whole(value: float) -> str:
    """'1,234,567'."""
    return f"{value:,.0f}" if math.isfinite(value) else "-"


def billions(count: float) -> str:
    """A parameter count: '70.6 B', '125 M'."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= scale:
            return f"{_three_digits(count / scale)} {unit}"
    return f"{count:.0f}"


def _three_digits(value: float) -> str:
    magnitude = abs(value)
    return f"{value:,.0f}" if magnitude >= 100 else f"{value:.1f}" if magnitude >= 10 else f"{value:.2f}"
