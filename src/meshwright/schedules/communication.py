"""Add the messages to a schedule: `with_communication(schedule)` puts sends and receives between the computation.

A message is sent right after the action that makes it and received at the same place of one common order of all
messages (their moments when every action takes its usual share of time). As both ends of every message keep to that
one order, no set of stages can wait for each other, even where a send blocks until it is received (gloo). Messages
that meet stand next to each other, so that a run of them can be one batched isend/irecv.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

from meshwright.schedules.actions import (
    COMMUNICATION,
    INPUT_GRADIENTS,
    Action,
    ActionKind,
    PipelineSchedule,
    message_of,
)
from meshwright.schedules.timing import Durations, simulate


def with_communication(schedule: PipelineSchedule) -> PipelineSchedule:
    """The schedule with explicit sends and receives (those it already has are kept out and made anew)."""
    computation = replace(
        schedule, actions=tuple(tuple(a for a in stage if a.kind not in COMMUNICATION) for stage in schedule.actions)
    )
    timeline = simulate(computation, Durations.of(computation, forward_s=1.0, backward_s=2.0))
    messages: list[tuple[float, int, Action]] = []
    for stage, timed in enumerate(timeline.stages):
        for t in timed:
            send = send_after(computation, t.action)
            if send is not None:
                messages.append((t.end_s, stage, send))
    messages.sort(key=lambda m: m[:2])  # a stage ends one action at a time: (moment, sender) is unique

    starts = [[t.start_s for t in timed] for timed in timeline.stages]
    slots: list[list[list[Action]]] = [[[] for _ in range(len(timed) + 1)] for timed in timeline.stages]
    for moment, sender, send in messages:
        receiver = computation.peer(send)
        slots[sender][bisect_left(starts[sender], moment)].append(send)
        slots[receiver][bisect_left(starts[receiver], moment)].append(message_of(send))
    merged: list[tuple[Action, ...]] = []
    for actions, around in zip(computation.actions, slots, strict=True):
        order = list(around[0])
        for action, after in zip(actions, around[1:], strict=True):
            order += [action, *after]
        merged.append(tuple(order))
    return replace(computation, actions=tuple(merged))


def send_after(schedule: PipelineSchedule, action: Action) -> Action | None:
    """The send that an action of computation calls for, if its result is needed on another stage."""
    if action.kind is ActionKind.FORWARD and schedule.sends_forward(action.chunk):
        return Action(ActionKind.SEND_FORWARD, action.chunk, action.microbatch)
    if action.kind in INPUT_GRADIENTS and action.chunk > 0 and schedule.sends_forward(action.chunk - 1):
        return Action(ActionKind.SEND_BACKWARD, action.chunk, action.microbatch)
    return None


def batches(actions: tuple[Action, ...]) -> list[tuple[Action, ...]]:
    """A stage's actions with each run of messages gathered into one tuple; computation stands alone."""
    groups: list[list[Action]] = []
    for action in actions:
        joins = action.kind in COMMUNICATION and groups and groups[-1][-1].kind in COMMUNICATION
        if joins:
            groups[-1].append(action)
        else:
            groups.append([action])
    return [tuple(group) for group in groups]
