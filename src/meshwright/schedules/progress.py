"""Can a schedule run to its end? `progress(schedule)` executes it without time and names what is stuck.

Runs of messages are posted together and waited for together; a message is through when both ends have posted it. That
is how gloo behaves with batched isend/irecv, and stricter than buffered sends. Without explicit messages, results
reach other stages as soon as they are made.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.schedules.actions import (
    COMMUNICATION,
    RECEIVES,
    SENDS,
    Action,
    ActionKind,
    PipelineSchedule,
    message_of,
)
from meshwright.schedules.communication import batches
from meshwright.schedules.timing import needs

Result = tuple[bool, int, int]
"""(is forward, chunk, microbatch) of an output or of the gradient of a chunk's input."""


@dataclass(frozen=True)
class Wait:
    """A stage that cannot go on: at which action, and for which stage (None: nothing will ever bring what it needs)."""

    stage: int
    action: Action
    waits_for: int | None
    why: str

    def __str__(self) -> str:
        return f"stage {self.stage} at {self.action} {self.why}"


def progress(schedule: PipelineSchedule) -> tuple[Wait, ...]:
    """The stages that are stuck, none if the schedule finishes."""
    run = _Run(schedule)
    work = list(range(schedule.stages))
    while work:
        stage = work.pop()
        while run.step(stage):
            work.extend(s for s in range(schedule.stages) if s != stage and s not in work)
    return tuple(run.wait(stage) for stage in range(schedule.stages) if not run.finished(stage))


def cycle_among(waits: tuple[Wait, ...]) -> tuple[Wait, ...]:
    """Stuck stages that wait for each other in a ring, in order; empty if there is none."""
    by_stage = {w.stage: w for w in waits}
    for start in by_stage:
        path: list[int] = []
        stage: int | None = start
        while stage is not None and stage in by_stage and stage not in path:
            path.append(stage)
            stage = by_stage[stage].waits_for
        if stage is not None and stage in path:
            return tuple(by_stage[s] for s in path[path.index(stage) :])
    return ()


class _Run:
    """State of an execution: how far each stage is, what is present where, which messages are posted."""

    def __init__(self, schedule: PipelineSchedule) -> None:
        self.schedule = schedule
        self.explicit = any(a.kind in COMMUNICATION for stage in schedule.actions for a in stage)
        self.queues = [batches(stage) for stage in schedule.actions]
        self.position = [0] * schedule.stages
        self.present: list[set[Result]] = [set() for _ in range(schedule.stages)]
        self.posted: set[Action] = set()  # chunk numbers are global: an action names its stage

    def finished(self, stage: int) -> bool:
        return self.position[stage] == len(self.queues[stage])

    def step(self, stage: int) -> bool:
        """Do the next thing of a stage; False if there is none or it must wait. Posting counts as doing."""
        if self.finished(stage):
            return False
        batch = self.queues[stage][self.position[stage]]
        if batch[0].kind not in COMMUNICATION:
            if self._missing(stage, batch[0]) is not None:
                return False
            self._finish(stage, batch[0])
        else:
            before = len(self.posted)
            self.posted.update(a for a in batch if a.kind in RECEIVES or self._made(stage, a))
            if not all(a in self.posted and _other_end(a) in self.posted for a in batch):
                return len(self.posted) > before
            for action in batch:
                if action.kind in RECEIVES:
                    self.present[stage].add(_received(action))
        self.position[stage] += 1
        return True

    def wait(self, stage: int) -> Wait:
        """Why a stage stands still."""
        for action in self.queues[stage][self.position[stage]]:
            if action.kind not in COMMUNICATION:
                missing = self._missing(stage, action)
                if missing is None:
                    continue
                owner = self.schedule.owner(missing[1])
                what = f"{'F' if missing[0] else 'B'}{missing[1]}.{missing[2]}"
                if owner == stage:
                    return Wait(stage, action, None, f"needs {what}, which this stage has not run before it")
                if self.explicit:
                    return Wait(stage, action, None, f"needs {what}, which it has not received before it")
                return Wait(stage, action, owner, f"waits for {what} of stage {owner}")
            if action.kind in SENDS and not self._made(stage, action):
                return Wait(stage, action, None, "sends what it has not computed")
            if _other_end(action) not in self.posted:
                peer = self.schedule.peer(action)
                return Wait(stage, action, peer, f"waits for {_other_end(action)} of stage {peer}")
        raise ValueError(f"stage {stage} is not waiting")

    def _made(self, stage: int, send: Action) -> bool:
        return (send.kind is ActionKind.SEND_FORWARD, send.chunk, send.microbatch) in self.present[stage]

    def _missing(self, stage: int, action: Action) -> Result | None:
        for is_forward, chunk in needs(self.schedule, action):
            result = (is_forward, chunk, action.microbatch)
            if result not in self.present[stage]:
                return result
        return None

    def _finish(self, stage: int, action: Action) -> None:
        if action.kind is ActionKind.BACKWARD_WEIGHT:
            return
        result = (action.kind is ActionKind.FORWARD, action.chunk, action.microbatch)
        self.present[stage].add(result)
        neighbour = action.chunk + (1 if result[0] else -1)
        if not self.explicit and 0 <= neighbour < self.schedule.total_chunks:
            self.present[self.schedule.owner(neighbour)].add(result)


def _received(receive: Action) -> Result:
    """What a receive brings: the previous chunk's output, or the next chunk's input gradient."""
    if receive.kind is ActionKind.RECEIVE_FORWARD:
        return (True, receive.chunk - 1, receive.microbatch)
    return (False, receive.chunk + 1, receive.microbatch)


def _other_end(action: Action) -> Action:
    if action.kind in SENDS:
        return message_of(action)
    if action.kind is ActionKind.RECEIVE_FORWARD:
        return Action(ActionKind.SEND_FORWARD, action.chunk - 1, action.microbatch)
    return Action(ActionKind.SEND_BACKWARD, action.chunk + 1, action.microbatch)
