"""The moments of a step at which a stage's memory can be at its peak: what it holds besides, action by action.

In: a schedule and a stage. Out: distinct `Moment`s, each an action of computation with the microbatches held around it,
the receive buffers that exist by then (`runtime.pipeline.BufferPool` never gives one up), and gradients on their way.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from meshwright.cost.program.sharding import Turn
from meshwright.layout.config import Schedule
from meshwright.schedules.actions import COMMUNICATION, INPUT_GRADIENTS, Action, ActionKind, PipelineSchedule
from meshwright.schedules.builders import build
from meshwright.schedules.communication import batches, with_communication

Counts = tuple[int, ...]


@dataclass(frozen=True)
class Moment:
    """An action on one of the stage's chunks (by its place among them); `split`: its backward pass is. Per chunk:
    microbatches `held` from forward to backward, passes whose weight gradients are `left`, and whether the last
    reduction's input is `retained`. `buffers` and `gradients`: tensors of a stage boundary's size."""

    kind: ActionKind
    chunk: int
    turn: Turn
    split: bool
    held: Counts
    left: Counts
    retained: tuple[bool, ...]
    buffers: int
    gradients: int


STEADY = 4
"""Microbatches per stage beyond which a step only repeats itself (but for GPipe's, which holds them all)."""


def settled(schedule: Schedule, pp: int, microbatches: int) -> int:
    """Fewer microbatches with the same peak: rounds of pp that only repeat are left out."""
    most = STEADY * pp + 2
    if schedule is Schedule.GPIPE or microbatches <= most:
        return microbatches
    return most + (microbatches - most) % pp


@lru_cache(maxsize=2048)
def moments(schedule: Schedule, pp: int, microbatches: int, vpp: int, stage: int) -> tuple[Moment, ...]:
    """Every distinct moment of a stage."""
    return tuple(dict.fromkeys(_Walk(_with_messages(schedule, pp, microbatches, vpp), stage).run()))


@lru_cache(maxsize=64)
def _with_messages(schedule: Schedule, pp: int, microbatches: int, vpp: int) -> PipelineSchedule:
    return with_communication(build(schedule, pp, microbatches, vpp))


BACKWARD = "backward"


def _pass(action: Action) -> str:
    """Forward, backward (whole or of inputs) and weights are counted apart."""
    return BACKWARD if action.kind in INPUT_GRADIENTS else action.kind.value


class _Walk:
    """The executor's bookkeeping (`runtime.pipeline`), without tensors."""

    def __init__(self, schedule: PipelineSchedule, stage: int) -> None:
        self.schedule = schedule
        self.own = schedule.chunks_of(stage)
        self.actions = schedule.actions[stage]
        self.held, self.left = ([0] * len(self.own) for _ in range(2))
        self.retained = [False] * len(self.own)
        self.free = self.created = 0
        self.waiting = self.sending = 0
        self.split = {(a.chunk, a.microbatch) for a in self.actions if a.kind is ActionKind.BACKWARD_INPUT}
        self.passes: Counter[tuple[str, int]] = Counter()

    def run(self) -> list[Moment]:
        found: list[Moment] = []
        for batch in batches(self.actions):
            if batch[0].kind in COMMUNICATION:
                self._communicate(batch)
                continue
            action = batch[0]
            found.append(self._moment(action))
            self._done(action)
        return found

    def _communicate(self, messages: tuple[Action, ...]) -> None:
        self.sending = 0  # what was sent has arrived by now
        for action in messages:
            if action.kind is ActionKind.SEND_BACKWARD:
                self.waiting, self.sending = self.waiting - 1, self.sending + 1
            elif action.kind in (ActionKind.RECEIVE_FORWARD, ActionKind.RECEIVE_BACKWARD):
                if self.free:
                    self.free -= 1
                else:
                    self.created += 1

    def _moment(self, action: Action) -> Moment:
        at = self.own.index(action.chunk)
        if action.kind in INPUT_GRADIENTS:
            self.retained[at] = False
        number = self.passes[(_pass(action), at)]
        return Moment(
            action.kind,
            at,
            self._turn(number),
            (action.chunk, action.microbatch) in self.split,
            tuple(self.held),
            tuple(self.left),
            tuple(self.retained),
            self.created,
            self.waiting + self.sending,
        )

    def _turn(self, number: int) -> Turn:
        last = self.schedule.microbatches - 1
        if last == 0:
            return Turn.ONLY
        return Turn.FIRST if number == 0 else Turn.LAST if number == last else Turn.MIDDLE

    def _done(self, action: Action) -> None:
        chunk, at = action.chunk, self.own.index(action.chunk)
        self.passes[(_pass(action), at)] += 1
        split = (chunk, action.microbatch) in self.split
        if action.kind is ActionKind.FORWARD:
            self.held[at] += 1
            return
        received = self.schedule.sends_forward(chunk)
        if action.kind is ActionKind.BACKWARD_WEIGHT:
            self.left[at] -= 1
            self.free += received
            self.retained[at] = self.passes[(BACKWARD, at)] < self.schedule.microbatches
            return
        self.held[at] -= 1
        self.left[at] += split
        self.free += received and not split
        if not received and chunk + 1 < self.schedule.total_chunks:
            self.waiting -= 1  # came from the next chunk on this stage
        if chunk > 0:
            self.waiting += 1
            self.free += self.schedule.sends_forward(chunk - 1)
        self.retained[at] = not split and self.passes[(BACKWARD, at)] < self.schedule.microbatches
