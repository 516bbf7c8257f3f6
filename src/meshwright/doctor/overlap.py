"""How much of a step's communication was hidden behind computing: recorded timelines of all ranks, put side by side.

In: `RankTimeline`s of one step. Out: every call with the moment at which the last of its ranks had issued it (before
that nothing can travel) and its end, and per axis the seconds in flight and those that ranks stood waiting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from meshwright.measurements import RankTimeline, TimedCall

MESSAGES = ("send", "receive")
Interval = tuple[float, float]
Key = tuple[tuple[int, ...], int, int, int]
"""(ranks of the group, sender, receiver, which of them): the same on all ranks of a call. Collectives: no sender."""


@dataclass(frozen=True, slots=True)
class MatchedCall:
    """A call of one rank. `met_s`: when its last rank had issued it."""

    rank: int
    call: TimedCall
    met_s: float
    end_s: float

    @property
    def exposed(self) -> tuple[Interval, ...]:
        """When this rank stood waiting for it while it was in flight."""
        return _within(self.call.waits, self.met_s, self.end_s)

    @property
    def late(self) -> tuple[Interval, ...]:
        """When it stood waiting for another rank to come."""
        return _within(self.call.waits, self.call.issued_s, self.met_s)


@dataclass(frozen=True, slots=True)
class AxisOverlap:
    """One axis in the mean over its ranks: seconds in flight, of these exposed (the rank stood waiting), and seconds
    that it waited for a rank that came late."""

    axis: str
    calls: float
    call_bytes: float
    in_flight_s: float
    exposed_s: float
    late_s: float

    @property
    def hidden(self) -> float:
        """Share of the time in flight in which the rank did something else."""
        return 1.0 - self.exposed_s / self.in_flight_s if self.in_flight_s > 0 else 0.0


def matched(timelines: Sequence[RankTimeline]) -> tuple[MatchedCall, ...]:
    """Every call of every rank beside its other ends; calls without an end that anybody saw last no time."""
    met: dict[Key, float] = {}
    arrived: dict[Key, float] = {}
    keyed = [(timeline.rank, key, call) for timeline in timelines for key, call in _keyed(timeline)]
    for _, key, call in keyed:
        met[key] = max(met.get(key, call.issued_s), call.issued_s)
        if call.collective == "receive" and call.ended_s is not None:
            arrived[key] = call.ended_s
    found: list[MatchedCall] = []
    for rank, key, call in keyed:
        ends = [end for end in (call.ended_s, arrived.get(key)) if end is not None]
        end = min(ends, default=call.issued_s)
        found.append(MatchedCall(rank, call, min(met[key], end), end))
    return tuple(found)


def axis_overlap(timelines: Sequence[RankTimeline]) -> tuple[AxisOverlap, ...]:
    """What each axis hides, in the order in which the axes are first used."""
    calls = matched(timelines)
    found: list[AxisOverlap] = []
    for axis in dict.fromkeys(m.call.axis for m in calls):
        own = [m for m in calls if m.call.axis == axis]
        by_rank = [[m for m in own if m.rank == rank] for rank in sorted({m.rank for m in own})]
        ranks = len(by_rank)
        found.append(
            AxisOverlap(
                axis,
                calls=len(own) / ranks,
                call_bytes=sum(m.call.call_bytes for m in own) / ranks,
                in_flight_s=sum(length((m.met_s, m.end_s) for m in ms) for ms in by_rank) / ranks,
                exposed_s=sum(length(i for m in ms for i in m.exposed) for ms in by_rank) / ranks,
                late_s=sum(length(i for m in ms for i in m.late) for ms in by_rank) / ranks,
            )
        )
    return tuple(found)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same moments as intervals that do not touch, in order."""
    merged: list[Interval] = []
    for start, end in sorted(i for i in intervals if i[1] > i[0]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """Seconds that the intervals cover, each moment once."""
    return sum(end - start for start, end in union(intervals))


def _within(intervals: Iterable[Interval], start: float, end: float) -> tuple[Interval, ...]:
    return tuple((max(a, start), min(b, end)) for a, b in intervals if min(b, end) > max(a, start))


def _keyed(timeline: RankTimeline) -> list[tuple[Key, TimedCall]]:
    counts: dict[tuple[tuple[int, ...], int, int], int] = {}
    found: list[tuple[Key, TimedCall]] = []
    for call in timeline.calls:
        sender = receiver = -1
        if call.collective in MESSAGES:
            sends = call.collective == "send"
            sender, receiver = (timeline.rank, call.peer) if sends else (call.peer, timeline.rank)
        number = counts.get((call.ranks, sender, receiver), 0)
        counts[call.ranks, sender, receiver] = number + 1
        found.append(((call.ranks, sender, receiver, number), call))
    return found
