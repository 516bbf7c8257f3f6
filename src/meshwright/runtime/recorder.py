"""The recorded ledger: every collective of this rank, counted by (axis, collective, phase, what) as it is issued.

One `Recorder` lives as long as its ProcessGroupManager; every axis carries it, so that whoever communicates records.
A record is one dictionary update; `enabled = False` leaves one attribute test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from meshwright.ledger import Collective, Phase, TrafficEntry

Key = tuple[str, Collective, Phase, str, int]


class Recorder:
    """Counts calls and bytes (bytes as defined in ledger.py). `phase` is set by whoever runs the step."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.phase = Phase.FORWARD
        self._counts: dict[Key, list[int]] = {}

    def record(self, axis: str, collective: Collective, what: str, group_size: int, call_bytes: int) -> None:
        if not self.enabled:
            return
        entry = self._counts.setdefault((axis, collective, self.phase, what, group_size), [0, 0])
        entry[0] += 1
        entry[1] += call_bytes

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Everything recorded inside belongs to `phase`."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def reset(self) -> None:
        self._counts.clear()

    def traffic(self) -> tuple[TrafficEntry, ...]:
        """What was recorded since the last reset, sorted by axis, phase, collective and subject."""
        entries = [
            TrafficEntry(axis, collective, phase, what, size, calls, total)
            for (axis, collective, phase, what, size), (calls, total) in self._counts.items()
        ]
        return tuple(sorted(entries, key=lambda e: (e.axis, e.phase, e.collective, e.what)))
