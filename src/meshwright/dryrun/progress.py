"""Can ranks whose calls match run to their end? Every rank executes its trace, blocking where a real one may block.

A collective blocks until every member of its group has come to it; a batch of messages until each has met its other
end. That is stricter than the runtime, which waits for messages where it uses them: what passes here cannot hang there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.dryrun.match import Finding, Traces
from meshwright.dryrun.trace import Event
from meshwright.ledger import Collective

Link = tuple[str, int, int]
"""(axis, sender, receiver)"""


@dataclass(frozen=True)
class Blocked:
    """A rank that waits, at which call, and for whom."""

    rank: int
    event: Event
    waits_for: tuple[int, ...]


def stuck(traces: Traces) -> tuple[Finding, ...]:
    """The ranks that wait for each other in a ring, or else every rank that waits; none if all come to the end.
    Calls to ranks that were not traced are taken as met."""
    run = _Run(traces)
    while run.advance():
        pass
    blocked = {rank: run.blocked(rank) for rank in traces if not run.finished(rank)}
    ring = _ring(blocked)
    return tuple(_finding(b) for b in (ring or blocked.values()))


def _finding(blocked: Blocked) -> Finding:
    others = ", ".join(str(r) for r in blocked.waits_for[:8])
    event = blocked.event
    return Finding(
        blocked.rank, event.axis, event.action, f"waits in {event.collective} of {event.what} for rank {others}"
    )


def batched(events: Sequence[Event]) -> list[tuple[Event, ...]]:
    """Messages of one batch together: those of one step of the schedule, or of a ring one hop."""
    batches: list[list[Event]] = []
    for event in events:
        last = batches[-1] if batches else []
        joins = (
            bool(last)
            and event.peer is not None
            and last[-1].peer is not None
            and (last[-1].axis, last[-1].step) == (event.axis, event.step)
            and (event.axis == "pp" or (event.collective, event.what) not in {(e.collective, e.what) for e in last})
        )
        if joins:
            last.append(event)
        else:
            batches.append([event])
    return [tuple(batch) for batch in batches]


class _Run:
    """How far each rank is, and how many messages of each link were posted at either end."""

    def __init__(self, traces: Traces) -> None:
        self._queues = {rank: batched(events) for rank, events in traces.items()}
        self._position = dict.fromkeys(traces, 0)
        self._sent: Counter[Link] = Counter()
        self._received: Counter[Link] = Counter()
        self._awaited: dict[int, dict[Link, tuple[int, int]]] = {}  # of a posted batch: sends and receives to be met

    def finished(self, rank: int) -> bool:
        return self._position[rank] == len(self._queues[rank])

    def advance(self) -> bool:
        """One round over all ranks; whether any of them moved."""
        moved = False
        for rank in self._queues:
            while not self.finished(rank) and self._step(rank):
                moved = True
        return moved

    def _head(self, rank: int) -> tuple[Event, ...]:
        return self._queues[rank][self._position[rank]]

    def _step(self, rank: int) -> bool:
        batch = self._head(rank)
        if batch[0].peer is None:
            group = [r for r in batch[0].group if r in self._queues]
            if not all(self._is_at(r, batch[0]) for r in group):
                return False
            for member in group:
                self._position[member] += 1
            return True
        if rank not in self._awaited:
            self._post(rank, batch)
        if self._open_links(rank):
            return False
        del self._awaited[rank]
        self._position[rank] += 1
        return True

    def _is_at(self, rank: int, event: Event) -> bool:
        if self.finished(rank):
            return False
        head = self._head(rank)[0]
        return head.peer is None and head.group == event.group

    def _post(self, rank: int, batch: tuple[Event, ...]) -> None:
        awaited: dict[Link, tuple[int, int]] = {}
        for event in batch:
            if event.peer not in self._queues:
                continue
            sends = event.collective is Collective.SEND
            link = (event.axis, rank, event.peer) if sends else (event.axis, event.peer, rank)
            (self._sent if sends else self._received)[link] += 1
            awaited[link] = (self._sent[link] if sends else 0, 0 if sends else self._received[link])
        self._awaited[rank] = awaited

    def _open_links(self, rank: int) -> list[Link]:
        """Links of the posted batch whose other end has not come as far. A send is met by a receive, and so on."""
        return [
            link
            for link, (sends, receives) in self._awaited.get(rank, {}).items()
            if self._received[link] < sends or self._sent[link] < receives
        ]

    def blocked(self, rank: int) -> Blocked:
        batch = self._head(rank)
        if batch[0].peer is None:
            missing = tuple(r for r in batch[0].group if r in self._queues and not self._is_at(r, batch[0]))
            return Blocked(rank, batch[0], missing)
        link = self._open_links(rank)[0]
        peer = link[1] if link[2] == rank else link[2]
        sends = link[1] == rank
        event = next(e for e in batch if e.peer == peer and (e.collective is Collective.SEND) == sends)
        return Blocked(rank, event, (peer,))


def _ring(blocked: dict[int, Blocked]) -> list[Blocked]:
    """Blocked ranks that wait for each other in a ring."""
    for start in blocked:
        path: list[int] = []
        rank: int | None = start
        while rank is not None and rank not in path:
            path.append(rank)
            rank = next((r for r in blocked[rank].waits_for if r in blocked), None)
        if rank is not None:
            return [blocked[r] for r in path[path.index(rank) :]]
    return []
