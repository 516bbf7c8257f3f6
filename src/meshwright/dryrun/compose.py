"""The trace of a stage that was not run, put together from one that was: same contents, another place in the pipeline.

A stage's trace is what each of its actions issues, in the order of its schedule. What an action issues depends on its
kind, on the chunk, and on whether it is the chunk's first or last of that kind. `compose` of a stage that was run must
give its own trace again, event for event; `Composer` refuses to work where that is not so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from meshwright.dryrun.job import RankTrace
from meshwright.dryrun.roles import Contents
from meshwright.dryrun.trace import Event
from meshwright.layout.grid import RankLayout
from meshwright.ledger import Collective, Phase
from meshwright.runtime.pipeline import SUBJECTS
from meshwright.schedules.actions import COMMUNICATION, SENDS, Action, ActionKind, PipelineSchedule
from meshwright.schedules.communication import batches

Key = tuple[ActionKind, int, bool, bool]
"""(kind, which of the stage's chunks, first of its kind, last of its kind)"""


class CompositionError(RuntimeError):
    """A trace is not the sum of its actions."""


@dataclass(frozen=True)
class Pieces:
    """A trace taken apart: what stands before and after the schedule, and what each action issues."""

    before: tuple[Event, ...]
    after: tuple[Event, ...]
    actions: Mapping[Key, tuple[Event, ...]]
    stage: int


class Composer:
    """Traces of any rank whose stage has the contents of a stage that was run."""

    def __init__(
        self, schedule: PipelineSchedule, layout: RankLayout, contents: Sequence[Contents], traces: Sequence[RankTrace]
    ) -> None:
        self._schedule = schedule
        self._layout = layout
        self._contents = contents
        self._message = next((e for t in traces for e in t.events if e.axis == "pp" and e.peer is not None), None)
        self._pieces: dict[tuple[Contents, int], Pieces] = {}
        for trace in traces:
            at = trace.coordinate
            self._pieces[(contents[at["pp"]], at["tp"])] = self._take_apart(trace)
            if self.compose(trace.rank) != trace.events:
                raise CompositionError(f"rank {trace.rank}: its trace is not the sum of its actions")

    def compose(self, rank: int) -> tuple[Event, ...]:
        """The trace of a rank."""
        at = {axis: int(c) for axis, c in self._layout.coordinates(rank).items()}
        stage = at["pp"]
        pieces = self._pieces.get((self._contents[stage], at["tp"])) or self._pieces[(self._contents[stage], 0)]
        here = {key: [self._moved(e, at) for e in events] for key, events in pieces.actions.items()}
        events = [self._moved(e, at) for e in pieces.before]
        order = batches(self._schedule.actions[stage])
        keys = _keys(self._schedule, stage)
        for step, batch in enumerate(order):
            if batch[0].kind in COMMUNICATION:
                events += [self._posted(action, step, rank) for action in batch]
            else:
                events += [replace(e, action=str(batch[0]), step=step) for e in here[keys[batch[0]]]]
        events += [replace(self._moved(e, at), step=len(order)) for e in pieces.after]
        return tuple(events)

    def _take_apart(self, trace: RankTrace) -> Pieces:
        stage = trace.coordinate["pp"]
        order, keys = batches(self._schedule.actions[stage]), _keys(self._schedule, stage)
        by_step: dict[int, list[Event]] = {}
        for event in trace.events:
            by_step.setdefault(event.step, []).append(event)
        actions: dict[Key, tuple[Event, ...]] = {}
        for step, batch in enumerate(order):
            if batch[0].kind not in COMMUNICATION:
                actions.setdefault(keys[batch[0]], tuple(by_step.get(step, ())))
        return Pieces(tuple(by_step.get(-1, ())), tuple(by_step.get(len(order), ())), actions, stage)

    def _posted(self, action: Action, step: int, rank: int) -> Event:
        """A message of the schedule, as the executor posts it."""
        assert self._message is not None
        stages = self._layout.group_of(rank, "pp").tolist()
        forward = action.kind in (ActionKind.SEND_FORWARD, ActionKind.RECEIVE_FORWARD)
        return replace(
            self._message,
            collective=Collective.SEND if action.kind in SENDS else Collective.RECEIVE,
            phase=Phase.FORWARD if forward else Phase.BACKWARD,
            what=SUBJECTS[action.kind],
            group=tuple(stages),
            action=str(action),
            step=step,
            peer=stages[self._schedule.peer(action)],
        )

    def _moved(self, event: Event, at: Mapping[str, int]) -> Event:
        """The same call on the groups of another rank: members keep their place relative to it."""
        template = {axis: int(c) for axis, c in self._layout.coordinates(event.group[0]).items()}
        members = self._layout.coordinates(list(event.group))
        varying = {axis for axis, c in members.items() if len(set(c.tolist())) > 1}
        fixed = {axis: at[axis] for axis in template if axis not in varying}
        group = tuple(self._layout.dense.rank({**members, **fixed}).tolist())
        if event.peer is None:
            return replace(event, group=group)
        return replace(event, group=group, peer=group[event.group.index(event.peer)])


def _keys(schedule: PipelineSchedule, stage: int) -> dict[Action, Key]:
    own = schedule.chunks_of(stage)
    computed = [a for a in schedule.actions[stage] if a.kind not in COMMUNICATION]
    first: dict[tuple[ActionKind, int], Action] = {}
    last: dict[tuple[ActionKind, int], Action] = {}
    for action in computed:
        first.setdefault((action.kind, action.chunk), action)
        last[(action.kind, action.chunk)] = action
    return {
        a: (a.kind, own.index(a.chunk), first[(a.kind, a.chunk)] == a, last[(a.kind, a.chunk)] == a) for a in computed
    }
