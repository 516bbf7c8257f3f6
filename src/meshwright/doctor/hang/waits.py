"""Who waits for whom: from every blocked rank to those that have not come yet, down to one that waits for nobody.

In: evidence and the states of processes. Out: the root of the waiting, the chain that leads to it, or a circle.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from meshwright.doctor.hang.evidence import Evidence
from meshwright.flight import RankLog
from meshwright.flight.layout import ENDED, FAILED
from meshwright.flight.processes import ProcessState


@dataclass(frozen=True)
class Wait:
    """A rank that blocks on a group, since when, and for which ranks (none: all have called, nothing arrives)."""

    rank: int
    group: int
    since_ns: int
    sequence: int
    peer: int  # -1: a collective
    laggards: tuple[int, ...]


@dataclass(frozen=True)
class Waiting:
    """`waits` by rank. `root`: the rank that most others wait for, directly or not; `chain` leads from the longest
    waiting of those to it. `circle`: ranks that wait for one another. `in_transit`: waits for what was sent."""

    waits: dict[int, Wait]
    root: int | None
    chain: tuple[int, ...]
    circle: tuple[int, ...]
    in_transit: tuple[Wait, ...]
    behind: int  # ranks that wait for the root


def is_over(log: RankLog | None, state: ProcessState) -> bool:
    """Whether a rank will never come."""
    return log is None or log.now.activity in (ENDED, FAILED) or state is ProcessState.GONE


def waiting(evidence: Evidence, states: dict[int, ProcessState]) -> Waiting:
    """The wait-for graph of the moment the logs were read."""
    waits = {log.identity.rank: wait for log in evidence.logs if (wait := _wait_of(evidence, log, states)) is not None}
    behind: dict[int, set[int]] = {}
    for start in waits:
        for sink in _sinks(waits, start):
            behind.setdefault(sink, set()).add(start)
    in_transit = tuple(sorted((w for w in waits.values() if not w.laggards), key=lambda w: w.since_ns))
    root = max(behind, key=lambda r: (len(behind[r]), -r)) if behind else None
    if root is None:
        return Waiting(waits, None, (), _circle(waits), in_transit, 0)
    first = min(behind[root], key=lambda r: waits[r].since_ns)
    return Waiting(waits, root, _path(waits, first, root), (), in_transit, len(behind[root]))


def _wait_of(evidence: Evidence, log: RankLog, states: dict[int, ProcessState]) -> Wait | None:
    now, rank = log.now, log.identity.rank
    if now.waiting_group < 0 or is_over(log, states.get(rank, ProcessState.UNKNOWN)):
        return None
    if states.get(rank) is ProcessState.STOPPED:
        return None
    group = evidence.group_of[(rank, now.waiting_group)]
    if now.peer >= 0:
        sent, received = (evidence.message_count.get((group, rank, now.peer, out), 0) for out in (True, False))
        there = evidence.message_count.get((group, now.peer, rank, True), 0)
        here = evidence.message_count.get((group, now.peer, rank, False), 0)
        others = (now.peer,)
        late = others if there < received or here < sent else ()
        sequence = received
    else:
        sequence = evidence.last_sequence.get((group, rank), 0)
        others = tuple(r for r in evidence.groups[group].ranks if r != rank)
        late = tuple(r for r in others if evidence.last_sequence.get((group, r), 0) < sequence)
    # a stopped or dead process may have called and still not send
    silent = late or tuple(r for r in others if _is_silent(evidence.log_of.get(r), states.get(r)))
    return Wait(rank, group, now.waiting_since_ns, sequence, now.peer, silent)


def _is_silent(log: RankLog | None, state: ProcessState | None) -> bool:
    return is_over(log, state or ProcessState.UNKNOWN) or state is ProcessState.STOPPED


def _sinks(waits: dict[int, Wait], start: int) -> set[int]:
    """Ranks reached from `start` that wait for nobody."""
    seen, queue, sinks = {start}, deque([start]), set[int]()
    while queue:
        for laggard in waits[queue.popleft()].laggards:
            if laggard not in seen:
                seen.add(laggard)
                if laggard in waits:
                    queue.append(laggard)
                else:
                    sinks.add(laggard)
    return sinks


def _path(waits: dict[int, Wait], start: int, root: int) -> tuple[int, ...]:
    """The shortest chain of waiting from `start` to `root`."""
    came: dict[int, int] = {start: start}
    queue = deque([start])
    while queue and root not in came:
        rank = queue.popleft()
        for laggard in waits[rank].laggards if rank in waits else ():
            if laggard not in came:
                came[laggard] = rank
                queue.append(laggard)
    path = [root]
    while path[-1] != start:
        path.append(came[path[-1]])
    return tuple(reversed(path))


def _circle(waits: dict[int, Wait]) -> tuple[int, ...]:
    """Ranks that wait for one another, or ()."""
    for start in waits:
        order: list[int] = []
        rank = start
        while rank in waits and waits[rank].laggards and rank not in order:
            order.append(rank)
            rank = waits[rank].laggards[0]
        if rank in order:
            return tuple(order[order.index(rank) :])
    return ()
