"""Cross products as arrays: a table is a dict of equally long integer columns, and `join` extends every row by every
option of its key. The enumerator builds millions of configurations from a few such joins, without a loop over rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from meshwright.cost.candidates import BoolArray, IntArray

Table = dict[str, IntArray]


def column(values: list[int] | tuple[int, ...]) -> IntArray:
    return np.array(values, dtype=np.int64)


def rows(table: Table) -> int:
    return len(next(iter(table.values())))


def keep(table: Table, mask: BoolArray) -> Table:
    """The rows where `mask` holds."""
    return {name: values[mask] for name, values in table.items()}


def product(**columns: IntArray) -> Table:
    """Every combination of the values given, the last column varying fastest."""
    grids = np.meshgrid(*columns.values(), indexing="ij")
    return {name: grid.ravel() for name, grid in zip(columns, grids, strict=True)}


class Options:
    """What each distinct key may be joined with: the options of all keys, one after the other.

    `counts[i]` is the number of options of row i.
    """

    def __init__(self, key: IntArray, options: Callable[[int], Table]) -> None:
        values, self._codes = np.unique(key, return_inverse=True)
        pieces = [options(int(value)) for value in values]
        sizes = np.array([rows(piece) for piece in pieces], dtype=np.int64)
        self._starts = np.cumsum(sizes) - sizes
        self._columns: Table = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        self.counts: IntArray = sizes[self._codes]

    def expand(self, start: int, stop: int) -> tuple[IntArray, Table]:
        """Rows start..stop-1, each repeated once per option: their positions and the option columns."""
        counts = self.counts[start:stop]
        position = np.repeat(np.arange(start, stop, dtype=np.int64), counts)
        first = self._starts[self._codes[start:stop]] - (np.cumsum(counts) - counts)
        pick = np.repeat(first, counts) + np.arange(len(position), dtype=np.int64)
        return position, {name: values[pick] for name, values in self._columns.items()}


def join(table: Table, key: IntArray, options: Callable[[int], Table]) -> Table:
    """Every row with every option of its key; `options(key)` is called once per distinct key."""
    if rows(table) == 0:
        return {**table, **{name: values[:0] for name, values in options(1).items()}}
    position, new = Options(key, options).expand(0, rows(table))
    return {**{name: values[position] for name, values in table.items()}, **new}


def divisors(n: int) -> list[int]:
    """Divisors of n in ascending order."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]
