"""Cross products as arrays: a table is a dict of equally long integer columns, and `join` extends every row by every
option of its key. The enumerator builds millions of configurations from a few such joins, without a loop over rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from meshwright.cost.candidates import BoolArray, IntArray

Table = dict[str, IntArray]


def column(values: list[int] | tuple[int, ...]) -> IntArray:
    return np.array(values, dtype=np.int64)


def rows(table: Table) -> int:
    return len(next(iter(table.values())))


def keep(table: Table, mask: IntArray | BoolArray) -> Table:
    """The rows where `mask` holds, or at the positions given."""
    return {name: values[mask] for name, values in table.items()}


def product(**columns: IntArray) -> Table:
    """Every combination of the values given, the last column varying fastest."""
    grids = np.meshgrid(*columns.values(), indexing="ij")
    return {name: grid.ravel() for name, grid in zip(columns, grids, strict=True)}


@dataclass(frozen=True)
class Options:
    """What every row may be joined with: row i has the `sizes[code[i]]` options from `starts[code[i]]` of `columns`."""

    code: IntArray
    starts: IntArray
    sizes: IntArray
    columns: Table

    @classmethod
    def by_key(cls, key: IntArray, options: Callable[[int], Table]) -> Options:
        """Options that depend on a key per row; `options(key)` is called once per distinct key."""
        values, code = np.unique(key, return_inverse=True)
        pieces = [options(int(value)) for value in values]
        sizes = np.array([rows(piece) for piece in pieces], dtype=np.int64)
        columns = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        return cls(code.ravel().astype(np.int64), np.cumsum(sizes) - sizes, sizes, columns)

    @classmethod
    def none(cls) -> Options:
        """For a table without rows."""
        empty = np.zeros(0, dtype=np.int64)
        return cls(empty, empty, empty, {})

    @classmethod
    def one(cls, count: int) -> Options:
        """A single option without columns for each of `count` rows."""
        return cls(np.zeros(count, dtype=np.int64), column([0]), column([1]), {})

    @property
    def counts(self) -> IntArray:
        """Options of every row."""
        return self.sizes[self.code]

    def take(self, chosen: IntArray | BoolArray) -> Options:
        """The same options for other rows."""
        return replace(self, code=self.code[chosen])

    def only(self, mask: BoolArray) -> Options:
        """Without the options (not rows) where `mask` is False."""
        before = np.concatenate([[0], np.cumsum(mask)])
        sizes = before[self.starts + self.sizes] - before[self.starts]
        return Options(self.code, np.cumsum(sizes) - sizes, sizes, keep(self.columns, mask))

    def expand(self, chosen: IntArray) -> tuple[IntArray, Table]:
        """The rows at positions `chosen`, each once per option: positions within `chosen`, and the option columns."""
        code = self.code[chosen]
        counts = self.sizes[code]
        position = np.repeat(np.arange(len(chosen), dtype=np.int64), counts)
        first = self.starts[code] - (np.cumsum(counts) - counts)
        pick = np.repeat(first, counts) + np.arange(len(position), dtype=np.int64)
        return position, {name: values[pick] for name, values in self.columns.items()}


def join(table: Table, key: IntArray, options: Callable[[int], Table]) -> Table:
    """Every row with every option of its key; `options(key)` is called once per distinct key."""
    if rows(table) == 0:
        return {**table, **{name: values[:0] for name, values in options(1).items()}}
    position, new = Options.by_key(key, options).expand(np.arange(rows(table)))
    return {**{name: values[position] for name, values in table.items()}, **new}


def divisors(n: int) -> list[int]:
    """Divisors of n in ascending order."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]
