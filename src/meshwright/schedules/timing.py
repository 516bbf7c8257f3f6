"""When every action of a schedule runs: `simulate(schedule, durations) -> Timeline`.

In: a schedule and seconds per chunk and kind. Out: start and end of each action, makespan, idle time and bubble
fraction. A stage runs its actions in order; an action waits for its own stage and for the messages it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.schedules.actions import COMMUNICATION, Action, ActionKind, PipelineSchedule


@dataclass(frozen=True)
class Durations:
    """Seconds of each action, by chunk in model order. `backward_input_s` + `backward_weight_s` make a full backward.

    `communication_s` is the time from the end of an action to the start of its dependant on another stage.
    """

    forward_s: tuple[float, ...]
    backward_input_s: tuple[float, ...]
    backward_weight_s: tuple[float, ...]
    communication_s: float = 0.0

    @classmethod
    def of(
        cls,
        schedule: PipelineSchedule,
        forward_s: float | Sequence[float],
        backward_s: float | Sequence[float],
        weight_s: float | Sequence[float] | None = None,
        communication_s: float = 0.0,
    ) -> Durations:
        """Of one chunk each, a number for all or one per chunk. `backward_s` is the whole backward pass, `weight_s`
        the part of it that makes weight gradients (None: half)."""

        def per_chunk(value: float | Sequence[float]) -> tuple[float, ...]:
            if isinstance(value, (int, float)):
                return (float(value),) * schedule.total_chunks
            if len(value) != schedule.total_chunks:
                raise ValueError(f"{len(value)} durations for {schedule.total_chunks} chunks")
            return tuple(float(v) for v in value)

        backward = per_chunk(backward_s)
        weight = tuple(b / 2 for b in backward) if weight_s is None else per_chunk(weight_s)
        inputs = tuple(b - w for b, w in zip(backward, weight, strict=True))
        return cls(per_chunk(forward_s), inputs, weight, communication_s)

    def of_action(self, action: Action) -> float:
        match action.kind:
            case ActionKind.FORWARD:
                return self.forward_s[action.chunk]
            case ActionKind.BACKWARD:
                return self.backward_input_s[action.chunk] + self.backward_weight_s[action.chunk]
            case ActionKind.BACKWARD_INPUT:
                return self.backward_input_s[action.chunk]
            case ActionKind.BACKWARD_WEIGHT:
                return self.backward_weight_s[action.chunk]
            case _:
                return 0.0


@dataclass(frozen=True)
class TimedAction:
    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """The timed actions of every stage."""

    stages: tuple[tuple[TimedAction, ...], ...]

    @property
    def makespan_s(self) -> float:
        return max((t.end_s for stage in self.stages for t in stage), default=0.0)

    @property
    def busy_s(self) -> tuple[float, ...]:
        """Seconds of computation per stage."""
        return tuple(sum(t.end_s - t.start_s for t in stage) for stage in self.stages)

    @property
    def idle_s(self) -> tuple[float, ...]:
        """Seconds per stage, of the makespan, without computation."""
        makespan = self.makespan_s
        return tuple(makespan - busy for busy in self.busy_s)

    @property
    def bubble_fraction(self) -> float:
        """Idle share of the makespan, over all stages."""
        makespan = self.makespan_s
        return sum(self.idle_s) / (len(self.stages) * makespan) if makespan > 0 else 0.0


def simulate(schedule: PipelineSchedule, durations: Durations) -> Timeline:
    """Run the computation of a schedule under the given durations. A schedule that cannot finish is a ValueError (ask
    `check` for the reason). Sends and receives in it take no time of their own: messages travel as computation ends.
    """
    queues = [[a for a in stage if a.kind not in COMMUNICATION] for stage in schedule.actions]
    done: dict[tuple[bool, int, int], float] = {}  # (is forward, chunk, microbatch) -> end
    timed: list[list[TimedAction]] = [[] for _ in queues]
    clock = [0.0] * len(queues)
    work = list(range(len(queues)))
    while work:
        stage = work.pop()
        while len(timed[stage]) < len(queues[stage]):
            action = queues[stage][len(timed[stage])]
            ready = _ready_s(schedule, action, done, durations.communication_s)
            if ready is None:
                break
            start = max(clock[stage], ready)
            clock[stage] = end = start + durations.of_action(action)
            timed[stage].append(TimedAction(action, start, end))
            if action.kind is not ActionKind.BACKWARD_WEIGHT:
                is_forward = action.kind is ActionKind.FORWARD
                done[is_forward, action.chunk, action.microbatch] = end
                neighbour = action.chunk + (1 if is_forward else -1)
                if 0 <= neighbour < schedule.total_chunks and (owner := schedule.owner(neighbour)) != stage:
                    work.append(owner)
    stuck = [str(q[len(t)]) for q, t in zip(queues, timed, strict=True) if len(t) < len(q)]
    if stuck:
        raise ValueError(f"schedule cannot finish: stages wait at {', '.join(stuck)}")
    return Timeline(tuple(tuple(t) for t in timed))


def _ready_s(
    schedule: PipelineSchedule, action: Action, done: dict[tuple[bool, int, int], float], communication_s: float
) -> float | None:
    """When what the action needs has arrived at its stage; None while it has not been produced."""
    ready = 0.0
    for is_forward, chunk in needs(schedule, action):
        end = done.get((is_forward, chunk, action.microbatch))
        if end is None:
            return None
        travels = schedule.owner(chunk) != schedule.owner(action.chunk)
        ready = max(ready, end + (communication_s if travels else 0.0))
    return ready


def needs(schedule: PipelineSchedule, action: Action) -> list[tuple[bool, int]]:
    """(is forward, chunk) of the results that an action of computation needs, of the same microbatch."""
    chunk = action.chunk
    if action.kind is ActionKind.FORWARD:
        return [(True, chunk - 1)] if chunk > 0 else []
    if action.kind is ActionKind.BACKWARD_WEIGHT:
        return [(False, chunk)]
    return [(True, chunk), (False, chunk + 1)] if chunk + 1 < schedule.total_chunks else [(True, chunk)]
