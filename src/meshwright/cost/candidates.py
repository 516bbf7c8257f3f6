"""Candidates: a struct of arrays, one row per parallel configuration; one configuration is the case n = 1.

Every cost function takes Candidates and returns arrays of the same length. `unit_keys` finds the distinct
(tp, sp, cp and its variant, ep, expert_tp, micro batch, recompute) rows, on which everything that happens inside a
layer depends, so that layer costs are computed once per key and gathered.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from meshwright.layout.config import ContextVariant, HybridParallelConfig, Precision, Recompute, Schedule

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]

SCHEDULES: tuple[Schedule, ...] = tuple(Schedule)
RECOMPUTES: tuple[Recompute, ...] = tuple(Recompute)
ZERO_STAGES = 4


@dataclass(frozen=True)
class Candidates:
    """Arrays of length n. `schedule` and `recompute` are positions in SCHEDULES and RECOMPUTES; `heads_exchanged` is
    context parallelism by all-to-all; `zero_shards` is resolved (dp * cp where a config says None). `splits[i]` holds
    the layer split of row i where any is uneven.
    """

    dp: IntArray
    tp: IntArray
    pp: IntArray
    cp: IntArray
    ep: IntArray
    expert_tp: IntArray
    vpp: IntArray
    sequence_parallel: BoolArray
    micro_batch: IntArray
    global_batch: IntArray
    schedule: IntArray
    zero: IntArray
    zero_shards: IntArray
    recompute: IntArray
    recompute_every: IntArray
    heads_exchanged: BoolArray
    precision: Precision
    splits: tuple[tuple[int, ...] | None, ...] | None = None

    def __len__(self) -> int:
        return len(self.dp)

    @cached_property
    def microbatches(self) -> IntArray:
        return self.global_batch // (self.dp * self.micro_batch)

    @property
    def world(self) -> IntArray:
        return self.dp * self.tp * self.pp * self.cp

    @property
    def expert_dp(self) -> IntArray:
        return self.dp * self.cp * self.tp // (self.ep * self.expert_tp)

    @classmethod
    def from_configs(cls, configs: Sequence[HybridParallelConfig]) -> Candidates:
        """One row per config; all must share one precision."""
        precisions = {c.precision for c in configs}
        if len(precisions) != 1:
            raise ValueError(f"candidates must share one precision, got {sorted(precisions)}")

        def column(name: str) -> IntArray:
            return np.array([getattr(c, name) for c in configs], dtype=np.int64)

        splits = tuple(c.layer_split for c in configs)
        return cls(
            **{n: column(n) for n in ("dp", "tp", "pp", "cp", "ep", "expert_tp", "vpp")},
            **{n: column(n) for n in ("micro_batch", "global_batch", "zero", "recompute_every")},
            sequence_parallel=np.array([c.sequence_parallel for c in configs], dtype=np.bool_),
            schedule=np.array([SCHEDULES.index(c.schedule) for c in configs], dtype=np.int64),
            zero_shards=np.array([c.zero_shards or c.dp * c.cp for c in configs], dtype=np.int64),
            recompute=np.array([RECOMPUTES.index(c.recompute) for c in configs], dtype=np.int64),
            heads_exchanged=np.array([c.cp_variant is ContextVariant.ALL_TO_ALL for c in configs], dtype=np.bool_),
            precision=precisions.pop(),
            splits=splits if any(splits) else None,
        )

    def config(self, row: int) -> HybridParallelConfig:
        """The configuration of one row."""
        shards = int(self.zero_shards[row])
        return HybridParallelConfig(
            **{
                n: int(getattr(self, n)[row])
                for n in ("dp", "tp", "pp", "cp", "ep", "expert_tp", "vpp", "micro_batch", "global_batch", "zero")
            },
            sequence_parallel=bool(self.sequence_parallel[row]),
            schedule=SCHEDULES[int(self.schedule[row])],
            zero_shards=None if shards == int(self.dp[row] * self.cp[row]) else shards,
            recompute=RECOMPUTES[int(self.recompute[row])],
            recompute_every=int(self.recompute_every[row]),
            cp_variant=ContextVariant.ALL_TO_ALL if self.heads_exchanged[row] else ContextVariant.RING,
            precision=self.precision,
            layer_split=self.splits[row] if self.splits else None,
        )

    def take(self, rows: IntArray | BoolArray) -> Candidates:
        """The chosen rows, in the order given."""
        chosen = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        picked = {name: getattr(self, name).take(chosen) for name in COLUMNS}
        splits = self.splits
        if splits is not None:
            splits = tuple(splits[int(i)] for i in chosen)
        return Candidates(**picked, precision=self.precision, splits=splits)


COLUMNS = tuple(f.name for f in fields(Candidates) if f.name not in ("precision", "splits"))
"""The arrays of a `Candidates`."""


@dataclass(frozen=True)
class UnitKeys:
    """The distinct in-layer settings among candidates: `candidates` has one row per key (its other fields are those
    of the first row that has the key and must not be read), `inverse` [n] maps each candidate to its key."""

    candidates: Candidates
    inverse: IntArray


UNIT_COLUMNS = (
    *("tp", "sequence_parallel", "cp", "heads_exchanged", "ep", "expert_tp", "micro_batch"),
    *("recompute", "recompute_every"),
)
"""What the costs inside a layer depend on."""


def unit_keys(candidates: Candidates) -> UnitKeys:
    """Distinct rows of UNIT_COLUMNS."""
    first, inverse = distinct([getattr(candidates, name) for name in UNIT_COLUMNS])
    return UnitKeys(candidates.take(first), inverse)


STATE_KNOBS = ("zero", "zero_shards", "recompute", "recompute_every")
"""Knobs that a search varies fastest: rows that follow one another often differ in these alone."""


UNIT_FRAME = tuple(name for name in UNIT_COLUMNS if name not in STATE_KNOBS)
"""What the costs inside a layer depend on beside recomputation."""


Coded = tuple[IntArray, int]
"""Values 0 .. k-1 of every row, and k."""


@dataclass(frozen=True)
class Chunk:
    """Some rows of candidates, and what their prices ask of every row again and again, worked out once.

    A *run* is a stretch of rows that agree in everything but STATE_KNOBS: `heads` has one row of each run, `of_row` [n]
    the run of every row. `sharding` codes (zero, zero_shards), `saving` (recompute, recompute_every); gaps may occur.
    """

    candidates: Candidates
    rows: IntArray  # [n], of candidates
    heads: Candidates
    of_row: IntArray
    sharding: Coded
    saving: Coded

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, candidates: Candidates) -> Chunk:
        """All candidates as they lie."""
        changed = np.zeros(len(candidates), dtype=np.bool_)
        changed[:1] = True
        for name in (name for name in COLUMNS if name not in STATE_KNOBS):
            column = getattr(candidates, name)
            changed[1:] |= column[1:] != column[:-1]
        splits = candidates.splits
        if splits is not None:
            changed[1:] |= np.array([a != b for a, b in itertools.pairwise(splits)], dtype=np.bool_)
        return cls(
            candidates=candidates,
            rows=np.arange(len(candidates)),
            heads=candidates.take(changed),
            of_row=np.cumsum(changed) - 1,
            sharding=_packed(codes(candidates.zero_shards), (candidates.zero, ZERO_STAGES)),
            saving=_packed(codes(candidates.recompute_every), (candidates.recompute, len(RECOMPUTES))),
        )

    def only(self, kept: IntArray) -> Chunk:
        """The chosen rows (positions in this chunk), in the order given."""
        run = self.of_row.take(kept)
        changed = np.ones(len(kept), dtype=np.bool_)
        np.not_equal(run[1:], run[:-1], out=changed[1:])
        sharding, saving = ((code.take(kept), size) for code, size in (self.sharding, self.saving))
        return Chunk(
            candidates=self.candidates,
            rows=self.rows.take(kept),
            heads=self.heads.take(run[changed]),
            of_row=np.cumsum(changed) - 1,
            sharding=sharding,
            saving=saving,
        )

    def take(self, positions: IntArray) -> Candidates:
        """The candidates at positions of this chunk. Most columns are read from the heads: those stay in the cache."""
        rows = self.rows.take(positions)
        knobs = {name: getattr(self.candidates, name).take(rows) for name in STATE_KNOBS}
        return replace(self.heads.take(self.of_row.take(positions)), **knobs)

    @property
    def by_saving(self) -> tuple[IntArray, IntArray]:
        """One row of every kind that differs in the run or in recomputation, and the kind of each row."""
        return _kinds([(self.of_row, len(self.heads)), self.saving])

    def unit_keys(self, positions: IntArray) -> UnitKeys:
        """As `unit_keys` of the candidates at positions."""
        frames, frame = distinct([getattr(self.heads, name) for name in UNIT_FRAME])
        saving, size = self.saving
        run = self.of_row.take(positions)
        first, inverse = _kinds([(frame.take(run), len(frames)), (saving.take(positions), size)])
        return UnitKeys(self.take(positions.take(first)), inverse)

    def distinct(self, shared: Sequence[IntArray | BoolArray], *own: Coded) -> tuple[IntArray, IntArray]:
        """As `distinct`, of columns of the runs (`shared`, as long as `heads`) and of rows (`own`): the first are told
        apart once per run."""
        first, kind = distinct(shared)
        return _kinds([(kind.take(self.of_row), len(first)), *own])


TABLE_PER_ROW = 8
"""Codes are counted in a table of up to this many entries per row; beyond it they are sorted."""
SMALL_TABLE = 1 << 19
"""A table of this size stays in a processor's cache: it is still quicker than sorting a tenth as many rows."""


def _table_limit(n: int) -> int:
    return max(TABLE_PER_ROW * n, min(8 * TABLE_PER_ROW * n, SMALL_TABLE), 1024)


def distinct(columns: Sequence[IntArray | BoolArray]) -> tuple[IntArray, IntArray]:
    """Distinct rows of columns of non-negative integers: the index of one row of each kind, and the kind of each row.
    Kinds are numbered in the order of their values, the first column first.

    Linear in rows: values are counted in tables, not sorted, as long as the tables stay small.
    """
    return _kinds([codes(column) for column in columns])


def _kinds(coded: Sequence[Coded]) -> tuple[IntArray, IntArray]:
    """`distinct` of columns that are coded already."""
    packed, size = coded[0]
    largest = _table_limit(len(packed))
    for code, values in coded[1:]:
        if size * values > largest:
            packed, size = codes(packed)
        packed, size = _packed((packed, size), (code, values))
    if size > largest:
        packed, size = codes(packed)
    some_row = np.full(size, -1)
    some_row[packed] = np.arange(len(packed))
    present = np.flatnonzero(some_row >= 0)
    return some_row.take(present), _numbered(present, size).take(packed)


def _packed(high: Coded, low: Coded) -> Coded:
    """Two codes as one."""
    both = high[0] * low[1]
    both += low[0]
    return both, high[1] * low[1]


def codes(values: IntArray | BoolArray) -> Coded:
    """Values as 0 .. k-1 in their order, and k."""
    whole = values.astype(np.int64, copy=False)
    top = int(whole.max(initial=0)) + 1
    if top > _table_limit(len(whole)):
        kinds, inverse = np.unique(whole, return_inverse=True)
        return inverse.astype(np.int64), len(kinds)
    occurs = np.zeros(top, dtype=np.bool_)
    occurs[whole] = True
    present = np.flatnonzero(occurs)
    return _numbered(present, top).take(whole), len(present)


def _numbered(present: IntArray, size: int) -> IntArray:
    """A table [size] of the place of each value among those present; other entries are never read."""
    table = np.empty(size, dtype=np.int64)
    table[present] = np.arange(len(present))
    return table
