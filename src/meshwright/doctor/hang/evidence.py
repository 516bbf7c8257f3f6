"""The logs of all ranks as one table of calls, with groups numbered over the whole job.

In: `RankLog`s. Out: `Evidence`: arrays with a row per call that a log still holds, and who the ranks are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.flight import Group, RankLog
from meshwright.flight.layout import COLLECTIVES, RECORD

COMPARED = ("collective", "phase", "bytes", "microbatch", "chunk", "dtype", "what")
"""Fields in which all members of a group agree when they make the same call."""
COMPARED_MESSAGE = ("bytes", "microbatch", "dtype")
"""Fields in which the two ends of a message agree."""
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Evidence:
    """`calls` has the fields of flight.layout.RECORD; `rank` and `group` (over the job) stand beside, row by row."""

    logs: tuple[RankLog, ...]
    groups: tuple[Group, ...]
    calls: NDArray[Any]
    rank: Ints
    group: Ints
    group_of: dict[tuple[int, int], int]  # (rank, its own number of a group) -> number over the job

    @classmethod
    def of(cls, logs: Sequence[RankLog]) -> Evidence:
        numbers: dict[tuple[int, ...], int] = {}
        groups: list[Group] = []
        group_of: dict[tuple[int, int], int] = {}
        tables: list[NDArray[Any]] = []
        ranks: list[Ints] = []
        mapped: list[Ints] = []
        for log in logs:
            local: list[int] = []
            for own, group in enumerate(log.identity.groups):
                if group.ranks not in numbers:
                    numbers[group.ranks] = len(groups)
                    groups.append(group)
                local.append(numbers[group.ranks])
                group_of[(log.identity.rank, own)] = local[-1]
            table = log.records
            tables.append(table)
            ranks.append(np.full(len(table), log.identity.rank, np.int64))
            mapped.append(np.asarray(local, np.int64)[table["group"]] if len(table) else np.empty(0, np.int64))
        calls = np.concatenate(tables) if tables else np.empty(0, RECORD)
        joined = np.concatenate(ranks) if ranks else np.empty(0, np.int64)
        return cls(
            tuple(logs), tuple(groups), calls, joined, np.concatenate(mapped) if mapped else joined.copy(), group_of
        )

    @property
    def world(self) -> int:
        return self.logs[0].identity.world

    @cached_property
    def log_of(self) -> dict[int, RankLog]:
        return {log.identity.rank: log for log in self.logs}

    @cached_property
    def missing(self) -> tuple[int, ...]:
        """Ranks of the world that left no log."""
        return tuple(sorted(set(range(self.world)) - self.log_of.keys()))

    @cached_property
    def collective(self) -> NDArray[np.bool_]:
        """Rows that are collectives rather than messages between two ranks."""
        return self.calls["peer"] < 0

    @cached_property
    def last_sequence(self) -> dict[tuple[int, int], int]:
        """(group, rank) -> sequence number of the rank's last collective in the group."""
        rows = np.flatnonzero(self.collective)
        order = rows[np.lexsort((self.calls["sequence"][rows], self.rank[rows], self.group[rows]))]
        group, rank, sequence = self.group[order], self.rank[order], self.calls["sequence"][order]
        last = np.ones(len(order), bool)
        last[:-1] = (group[1:] != group[:-1]) | (rank[1:] != rank[:-1])
        return {(int(g), int(r)): int(s) for g, r, s in zip(group[last], rank[last], sequence[last], strict=True)}

    @cached_property
    def message_count(self) -> dict[tuple[int, int, int, bool], int]:
        """(group, rank, peer, sent?) -> how many messages the rank has called for."""
        sent = COLLECTIVES.index(SEND)
        rows = np.flatnonzero(~self.collective)
        found: dict[tuple[int, int, int, bool], int] = {}
        order = rows[np.argsort(self.calls["sequence"][rows], kind="stable")]
        columns = (self.group, self.rank, self.calls["peer"], self.calls["collective"] == sent, self.calls["sequence"])
        for g, r, p, out, s in zip(*(column[order].tolist() for column in columns), strict=True):
            found[(g, r, p, out)] = s
        return found

    def coordinates(self, rank: int) -> str:
        """'dp1 pp2 tp0': the axes on which the job's ranks differ."""
        log = self.log_of.get(rank)
        if log is None:
            return f"rank {rank}"
        return " ".join(f"{axis}{log.identity.coordinates.get(axis, 0)}" for axis in self.axes) or "the only rank"

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Axes on which more than one coordinate occurs, in the order of the logs."""
        first = self.logs[0].identity.coordinates
        return tuple(a for a in first if any(log.identity.coordinates.get(a) != first[a] for log in self.logs))

    def name(self, rank: int) -> str:
        """'dp1 pp2 tp0 (rank 20, node-3)'."""
        log = self.log_of.get(rank)
        return f"rank {rank}" if log is None else f"{self.coordinates(rank)} (rank {rank}, {log.identity.host})"


def signature(calls: NDArray[Any], fields: Sequence[str]) -> NDArray[np.uint64]:
    """A number per row that is equal where the fields are."""
    total = np.zeros(len(calls), np.uint64)
    for name in fields:
        column = np.ascontiguousarray(calls[name])
        width = column.dtype.itemsize
        padded = np.zeros((len(calls), -(-width // 8) * 8), np.uint8)
        padded[:, :width] = column.view(np.uint8).reshape(len(calls), width)
        for word in padded.view(np.uint64).T:
            total = (total ^ word) * MULTIPLIER
            total ^= total >> np.uint64(29)
    return total


SEND = next(c for c in COLLECTIVES if c.value == "send")
