"""Replays a schedule: every stage runs its actions in order, messages travel on a stream per link, gradients reduce
beside the last backward passes.

In: a schedule and the work of its stages. Out: spans. The part of a message that cannot hide blocks its sender; the
next stage starts when the message has arrived. Of a reduction, the share that may hide runs from the start of the
backward pass that makes its gradients, the rest after the stage's last action; the optimizer waits for all stages, as
the norm of the gradients does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from meshwright.ledger import Phase
from meshwright.schedules import Action, ActionKind, PipelineSchedule
from meshwright.schedules.actions import INPUT_GRADIENTS
from meshwright.schedules.timing import needs
from meshwright.simulation.timeline import IN_LAYER, Span, Stream
from meshwright.simulation.work import ChunkWork, StageWork, StepWork

HIDING_SHARE = 0.5
"""Of a pass, what may run beside a message over a stage boundary (as cost.turns)."""


@dataclass
class _Stage:
    """How far a stage is: its queue, when its compute and dp streams are free, what of its reductions must wait."""

    number: int
    work: StageWork
    queue: tuple[Action, ...]
    last_gradient: dict[int, int]  # chunk -> position of its last weight gradient in the queue
    clock_s: float = 0.0
    dp_free_s: float = 0.0
    deferred_s: float = 0.0
    position: int = 0
    spans: list[Span] = field(default_factory=list[Span])

    def add(self, stream: Stream, name: str, start_s: float, seconds: float, exposed_s: float = 0.0) -> float:
        if seconds > 0:
            self.spans.append(Span(self.number, stream, name, start_s, start_s + seconds, exposed_s))
        return start_s + seconds


def replay(schedule: PipelineSchedule, work: StepWork) -> tuple[Span, ...]:
    """Spans of every stage. A schedule that cannot finish is a ValueError."""
    stages = [_begin(number, work.stages[number], queue) for number, queue in enumerate(schedule.actions)]
    arrived: dict[tuple[bool, int, int], float] = {}
    links: dict[tuple[int, int], float] = {}
    waiting = list(range(len(stages)))
    while waiting:
        stage = stages[waiting.pop()]
        while stage.position < len(stage.queue):
            action = stage.queue[stage.position]
            ready = [arrived.get((forward, chunk, action.microbatch)) for forward, chunk in _foreign(schedule, action)]
            if None in ready:
                break
            start = max([stage.clock_s, *(r for r in ready if r is not None)])
            peer = _run(schedule, work, stage, action, start, arrived, links)
            stage.position += 1
            if peer is not None:
                waiting.append(peer)
    if any(stage.position < len(stage.queue) for stage in stages):
        raise ValueError("schedule cannot finish: stages wait for each other")
    return tuple(_finished(stages, work))


def _begin(number: int, work: StageWork, queue: tuple[Action, ...]) -> _Stage:
    makes = (ActionKind.BACKWARD, ActionKind.BACKWARD_WEIGHT)
    last = {action.chunk: position for position, action in enumerate(queue) if action.kind in makes}
    stage = _Stage(number, work, queue, last)
    stage.add(Stream.DP, "gather parameters", 0.0, work.gather_wire_s, work.gather_s)
    stage.clock_s = work.gather_s
    return stage


def _foreign(schedule: PipelineSchedule, action: Action) -> Iterator[tuple[bool, int]]:
    """Results that an action needs from another stage; those of its own stage are there by the order of the queue."""
    here = schedule.owner(action.chunk)
    return ((forward, chunk) for forward, chunk in needs(schedule, action) if schedule.owner(chunk) != here)


def _run(
    schedule: PipelineSchedule,
    work: StepWork,
    stage: _Stage,
    action: Action,
    start: float,
    arrived: dict[tuple[bool, int, int], float],
    links: dict[tuple[int, int], float],
) -> int | None:
    """Run one action; the stage that its result goes to, if to another."""
    chunk = stage.work.chunks[action.chunk]
    seconds = _seconds(chunk, action.kind)
    end = stage.add(Stream.COMPUTE, str(action), start, seconds)
    if action.kind is not ActionKind.BACKWARD_WEIGHT:
        _in_layer(stage, chunk, action, start)
    stage.clock_s = end
    if stage.work.deferred and stage.last_gradient.get(action.chunk) == stage.position:
        _reduce(stage, work, action, start, end)
    return _send(schedule, work, stage, action, end, seconds, arrived, links)


def _send(
    schedule: PipelineSchedule,
    work: StepWork,
    stage: _Stage,
    action: Action,
    end: float,
    seconds: float,
    arrived: dict[tuple[bool, int, int], float],
    links: dict[tuple[int, int], float],
) -> int | None:
    """Put an action's result on the link to its reader: the reader waits for the last byte, the sender for the part
    that does not hide."""
    forward = action.kind is ActionKind.FORWARD
    if not forward and action.kind not in INPUT_GRADIENTS:
        return None
    reader = action.chunk + (1 if forward else -1)
    if not 0 <= reader < schedule.total_chunks or (peer := schedule.owner(reader)) == stage.number:
        return None
    message = work.message_s[0 if forward else 1]
    hidden = min(work.pp_overlap * message, HIDING_SHARE * seconds)
    blocked = message - (1.0 - work.contention) * hidden
    start = max(end, links.get((stage.number, peer), 0.0))
    name = f"{'activations' if forward else 'gradients'} {action.chunk}.{action.microbatch} to stage {peer}"
    links[stage.number, peer] = stage.add(Stream.SEND, name, start, message, blocked)
    arrived[forward, action.chunk, action.microbatch] = start + message
    stage.clock_s = end + blocked
    return peer


def _seconds(chunk: ChunkWork, kind: ActionKind) -> float:
    match kind:
        case ActionKind.FORWARD:
            return chunk.forward_s
        case ActionKind.BACKWARD:
            return chunk.backward_s
        case ActionKind.BACKWARD_WEIGHT:
            return chunk.weight_s
        case _:
            return chunk.backward_s - chunk.weight_s


def _in_layer(stage: _Stage, chunk: ChunkWork, action: Action, start: float) -> None:
    """Spans of tp, cp and ep inside a pass: their seconds on the wire, from the start of the pass (in truth spread over
    its layers)."""
    phase = Phase.FORWARD if action.kind is ActionKind.FORWARD else Phase.BACKWARD
    for stream in IN_LAYER:
        if (message := chunk.in_layer.get((stream.value, phase))) is not None:
            stage.add(stream, f"{stream} of {action}", start, message.wire_s, message.exposed_s)


def _reduce(stage: _Stage, work: StepWork, action: Action, start: float, end: float) -> None:
    """The reduction of a chunk's gradients: what may hide begins with the last backward pass that makes them."""
    chunk = stage.work.chunks[action.chunk]
    total = sum(c.backward_s for c in stage.work.chunks.values())
    seconds = stage.work.reduction_s * (chunk.backward_s / total if total > 0 else 1.0 / len(stage.work.chunks))
    early = work.dp_overlap * seconds
    begin = max(start, stage.dp_free_s)
    stage.dp_free_s = stage.add(Stream.DP, f"reduce gradients of chunk {action.chunk}", begin, early)
    beside = max(0.0, min(stage.dp_free_s, end) - begin)
    stage.deferred_s += seconds - early
    stage.clock_s = end + work.contention * beside
    if stage.dp_free_s > end:  # what runs side by side slows both
        stage.dp_free_s += work.contention * beside


def _finished(stages: list[_Stage], work: StepWork) -> Iterator[Span]:
    """What follows the last action: the rest of the reductions, then all stages' optimizers at once."""
    ends: list[float] = []
    for stage in stages:
        begin = max(stage.clock_s, stage.dp_free_s)
        late = stage.add(Stream.DP, "reduce gradients, what cannot hide", begin, stage.deferred_s, stage.deferred_s)
        ends.append(stage.add(Stream.DP, "tied weights, norms", late, stage.work.final_s, stage.work.final_s))
    for stage in stages:
        stage.add(Stream.COMPUTE, "optimizer", max(ends), stage.work.optimizer_s)
        yield from sorted(stage.spans, key=lambda span: (span.start_s, span.stream))
