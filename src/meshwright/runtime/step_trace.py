"""When a rank does what in one step: every action of the schedule and every collective, with the host's clock.

In: what the executor begins (`begins`), and what `AxisGroup.record` and `AxisGroup.waiting` see. Out: a `RankTimeline`.
Attached to the recorder for one step. Times are the host's: where communication is asynchronous (GPUs), a wait is over
when it is enqueued.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch.distributed as dist

from meshwright.ledger import Collective, Phase
from meshwright.measurements import RankTimeline, TimedCall, TimedWork

TELLS_ITS_END = (Collective.ALL_REDUCE, Collective.ALL_GATHER)
"""Collectives whose futures gloo has."""


@dataclass
class OpenCall:
    """A call of this step. `asynchronous`: it goes on after the call has returned, until it is waited for."""

    axis: str
    ranks: tuple[int, ...]
    collective: Collective
    phase: Phase
    what: str
    call_bytes: int
    peer: int
    asynchronous: bool
    issued_s: float
    told_s: float | None = None
    ended_s: float | None = None
    waits: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])

    def follow(self, work: dist.Work) -> None:
        """Have gloo tell the end of an asynchronous call. (It calls back from a thread of its own.)"""
        if self.collective in TELLS_ITS_END:
            work.get_future().add_done_callback(self._told)

    def waited(self, start_s: float, end_s: float, over: bool) -> None:
        self.waits.append((start_s, end_s))
        if over:
            self.ended_s = end_s if self.told_s is None else min(self.told_s, end_s)

    def closed(self) -> TimedCall:
        return TimedCall(
            self.axis,
            self.ranks,
            self.collective.value,
            self.phase.value,
            self.what,
            self.call_bytes,
            self.peer,
            self.issued_s,
            self.ended_s,
            tuple(self.waits),
        )

    def _told(self, _future: Any) -> None:
        self.told_s = time.time()


class StepTrace:
    """Of one rank and step. The main thread writes. `tells_ends`: the backend's futures are done when the call is
    (gloo's; those of NCCL when it is enqueued)."""

    def __init__(self, tells_ends: bool) -> None:
        self.tells_ends = tells_ends
        self._start_s = time.time()
        self._work: list[TimedWork] = []
        self._calls: list[OpenCall] = []
        self._blocking: dict[tuple[int, ...], list[OpenCall]] = {}
        self._last: dict[tuple[int, ...], OpenCall] = {}
        self._doing: tuple[str, int, int, float] | None = None

    def begins(self, kind: str, chunk: int, microbatch: int) -> None:
        """The rank turns to this computation ('': to none that has a name)."""
        now = time.time()
        if self._doing is not None:
            self._work.append(TimedWork(*self._doing, now))
        self._doing = (kind, chunk, microbatch, now) if kind else None

    def issued(
        self,
        axis: str,
        ranks: tuple[int, ...],
        collective: Collective,
        phase: Phase,
        what: str,
        call_bytes: int,
        peer: int,
        asynchronous: bool,
    ) -> OpenCall:
        call = OpenCall(axis, ranks, collective, phase, what, call_bytes, peer, asynchronous, time.time())
        self._calls.append(call)
        self._last[ranks] = call
        if not asynchronous:
            self._blocking.setdefault(ranks, []).append(call)
        return call

    def waited(self, ranks: tuple[int, ...], calls: tuple[OpenCall, ...], start_s: float) -> None:
        """The host has waited on a group: for these calls, or else inside the blocking ones that it made, or to
        post the last one."""
        now = time.time()
        ending = calls or tuple(self._blocking.pop(ranks, ()))
        for call in ending:
            call.waited(start_s, now, over=True)
        if not ending and ranks in self._last:
            self._last[ranks].waited(start_s, now, over=False)

    def finish(self, rank: int, stage: int, step: int) -> RankTimeline:
        self.begins("", -1, -1)
        calls = tuple(call.closed() for call in self._calls)
        return RankTimeline(rank, stage, step, self._start_s, time.time(), tuple(self._work), calls)


class TracedWait:
    """What `AxisGroup.waiting` gives, noted in a trace too."""

    def __init__(
        self,
        inner: AbstractContextManager[object],
        trace: StepTrace,
        ranks: tuple[int, ...],
        calls: tuple[OpenCall, ...],
    ) -> None:
        self._inner, self._trace = inner, trace
        self._ranks, self._calls = ranks, calls
        self._start_s = 0.0

    def __enter__(self) -> None:
        self._start_s = time.time()
        self._inner.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._inner.__exit__(kind, error, at)
        self._trace.waited(self._ranks, self._calls, self._start_s)
