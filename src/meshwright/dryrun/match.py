"""Do the traces of several ranks fit together? Collectives of each group in order, kind and size; sends and receives.

In: the events of ranks. Out: `Finding`s, each with the rank, the axis and the action at fault; none if all meet.
Whether ranks that match can also wait for each other in a ring is `progress.stuck`'s to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meshwright.dryrun.trace import POINT_TO_POINT, Event
from meshwright.ledger import Collective

Traces = Mapping[int, Sequence[Event]]


@dataclass(frozen=True)
class Finding:
    """Something that would hang or corrupt the job."""

    rank: int
    axis: str
    action: str
    problem: str

    def __str__(self) -> str:
        return f"rank {self.rank}, axis {self.axis}, at {self.action}: {self.problem}"


Step = tuple[Collective, str, str, int]
"""What the members of a group must agree on, call by call: collective, subject, dtype, bytes."""


def unmatched(traces: Traces) -> tuple[Finding, ...]:
    """Every group and every pair of ranks whose calls do not fit. Members that were not traced are not compared."""
    return (*_collectives(traces), *_messages(traces))


def _collectives(traces: Traces) -> list[Finding]:
    sequences: dict[tuple[int, ...], dict[int, list[Event]]] = {}
    for rank, events in traces.items():
        for event in events:
            if event.peer is None:
                calls = sequences.setdefault(event.group, {r: [] for r in event.group if r in traces})
                calls[rank].append(event)
    return [finding for members in sequences.values() for finding in _disagreements(members)]


def _disagreements(members: dict[int, list[Event]]) -> list[Finding]:
    """The ranks whose calls on one group are not those of most of its members (of the lowest rank, where no sequence
    has most)."""
    steps = {rank: tuple(_step(e) for e in events) for rank, events in members.items()}
    counted = Counter(steps.values())
    usual, _ = counted.most_common(1)[0]
    model = next(rank for rank in members if steps[rank] == usual)
    return [_explain(rank, members[rank], members[model]) for rank in members if steps[rank] != usual]


def _explain(rank: int, own: Sequence[Event], usual: Sequence[Event]) -> Finding:
    """What went wrong at the first call that differs."""
    at = next((i for i, (a, b) in enumerate(zip(own, usual, strict=False)) if _step(a) != _step(b)), -1)
    if at < 0:
        longer, verb = (own, "issues") if len(own) > len(usual) else (usual, "never issues")
        extra = longer[min(len(own), len(usual))]
        against = "which the others do not" if verb == "issues" else "which the others wait for"
        return Finding(rank, extra.axis, extra.action, f"{verb} the {extra.collective} of {extra.what}, {against}")
    mine, theirs = own[at], usual[at]
    rest = [_step(e) for e in own[at:]]
    expected = [_step(e) for e in usual[at:]]
    axis, action = theirs.axis, theirs.action
    if rest[:2] == expected[1::-1] and len(rest) > 1:
        return Finding(rank, axis, action, f"{mine.what} comes before {theirs.what}: the others have the other order")
    if (mine.collective, mine.what) == (theirs.collective, theirs.what):
        sizes = f"{mine.call_bytes:,} bytes of {mine.dtype}, the others {theirs.call_bytes:,} of {theirs.dtype}"
        return Finding(rank, axis, action, f"{mine.collective} of {mine.what} has {sizes}")
    return Finding(rank, axis, action, f"issues {mine} where the others issue {theirs}")


def _step(event: Event) -> Step:
    return event.collective, event.what, event.dtype, event.call_bytes


def _messages(traces: Traces) -> list[Finding]:
    """Messages of a pair of ranks meet in the order in which they are posted."""
    sent: dict[tuple[str, int, int], list[Event]] = {}
    received: dict[tuple[str, int, int], list[Event]] = {}
    for rank, events in traces.items():
        for event in events:
            if event.peer in traces and event.collective in POINT_TO_POINT:
                assert event.peer is not None
                outgoing = event.collective is Collective.SEND
                pair = (rank, event.peer) if outgoing else (event.peer, rank)
                (sent if outgoing else received).setdefault((event.axis, *pair), []).append(event)
    findings: list[Finding] = []
    for key in sorted(sent.keys() | received.keys()):
        problem = _first_unmet(key, sent.get(key, []), received.get(key, []))
        if problem is not None:
            findings.append(problem)
    return findings


def _first_unmet(key: tuple[str, int, int], sent: Sequence[Event], received: Sequence[Event]) -> Finding | None:
    axis, sender, receiver = key
    for send, receive in zip(sent, received, strict=False):
        if (send.dtype, send.call_bytes) != (receive.dtype, receive.call_bytes):
            text = (
                f"sends {send.call_bytes:,} bytes of {send.dtype}, rank {receiver} receives {receive.call_bytes:,} of"
            )
            return Finding(sender, axis, send.action, f"{text} {receive.dtype} at {receive.action}")
        if not _same_message(send, receive):
            if not any(_same_message(s, receive) for s in sent):
                return Finding(sender, axis, receive.action, f"never sends what rank {receiver} waits for")
            return Finding(sender, axis, send.action, f"its message meets {receive.action} of rank {receiver}")
    if len(sent) > len(received):
        lost = sent[len(received)]
        return Finding(receiver, axis, lost.action, f"never receives what rank {sender} sends at {lost.action}")
    if len(received) > len(sent):
        open_end = received[len(sent)]
        return Finding(sender, axis, open_end.action, f"never sends what rank {receiver} waits for")
    return None


def _same_message(send: Event, receive: Event) -> bool:
    """Of pipeline messages the actions say which chunk and microbatch: SF1.3 is what RF2.3 receives."""
    if send.axis != "pp":
        return send.what == receive.what
    if send.action[:1] != "S" or receive.action[:1] != "R" or send.action[1] != receive.action[1]:
        return False
    chunk, microbatch = (int(n) for n in send.action[2:].split("."))
    next_chunk = chunk + 1 if send.action[1] == "F" else chunk - 1
    return receive.action[2:] == f"{next_chunk}.{microbatch}"
