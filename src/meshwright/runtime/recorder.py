"""The recorded ledger: every collective of this rank, counted by (axis, collective, phase, what) as it is issued.

One `Recorder` lives as long as its ProcessGroupManager; every axis carries it, so that whoever communicates records.
A record is one dictionary update; `enabled = False` leaves one attribute test. It also holds how long the host was
inside collectives of each axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from types import TracebackType

from meshwright.flight import FlightLog
from meshwright.ledger import Collective, Phase, TrafficEntry
from meshwright.runtime.step_trace import StepTrace

Key = tuple[str, Collective, Phase, str, int]


class Stopwatch:
    """Adds up the wall time inside `with` blocks. Re-entered blocks would count twice: collectives do not nest."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def __enter__(self) -> None:
        self._since = perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.seconds += perf_counter() - self._since


class LoggedWait:
    """A stopwatch whose waits also stand in the flight log: on which group, and on which peer's message."""

    def __init__(self, watch: Stopwatch, log: FlightLog, axis: str, ranks: tuple[int, ...], peer: int) -> None:
        self._watch, self._log = watch, log
        self._axis, self._ranks, self._peer = axis, ranks, peer

    def __enter__(self) -> None:
        self._log.wait_begins(self._axis, self._ranks, self._peer)
        self._watch.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._watch.__exit__(kind, error, at)
        if error is None:  # a wait that failed is what the doctor wants to see
            self._log.wait_ends()


class Recorder:
    """Counts calls and bytes (bytes as defined in ledger.py). `phase` is set by whoever runs the step; `flight` and
    `trace`, where there is one, also get every call and wait."""

    def __init__(self, enabled: bool = True, flight: FlightLog | None = None) -> None:
        self.enabled = enabled
        self.flight = flight
        self.trace: StepTrace | None = None
        self.phase = Phase.FORWARD
        self._counts: dict[Key, list[int]] = {}
        self._watches: dict[str, Stopwatch] = {}

    def record(self, axis: str, collective: Collective, what: str, group_size: int, call_bytes: int) -> None:
        if not self.enabled:
            return
        entry = self._counts.setdefault((axis, collective, self.phase, what, group_size), [0, 0])
        entry[0] += 1
        entry[1] += call_bytes

    def begins(self, kind: str, chunk: int = -1, microbatch: int = -1) -> None:
        """This rank turns to a computation ('' to none): for the timeline of the step, where one is made."""
        if self.trace is not None:
            self.trace.begins(kind, chunk, microbatch)

    def waiting(self, axis: str) -> Stopwatch:
        """Wrap what blocks the host: a collective, or the wait for one. Where communication is asynchronous (GPUs) this
        is the time to enqueue it."""
        watch = self._watches.get(axis)
        if watch is None:
            watch = self._watches[axis] = Stopwatch()
        return watch

    def waited_s(self) -> dict[str, float]:
        """Seconds of `waiting` per axis since the last reset."""
        return {axis: watch.seconds for axis, watch in sorted(self._watches.items()) if watch.seconds}

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
        self._watches.clear()

    def traffic(self) -> tuple[TrafficEntry, ...]:
        """What was recorded since the last reset, sorted by axis, phase, collective and subject."""
        entries = [
            TrafficEntry(axis, collective, phase, what, size, calls, total)
            for (axis, collective, phase, what, size), (calls, total) in self._counts.items()
        ]
        return tuple(sorted(entries, key=lambda e: (e.axis, e.phase, e.collective, e.what)))
