"""What a pipeline stage does, as data: `Action`s in order per stage, gathered in a `PipelineSchedule`.

An action is about one chunk (global number, in model order) and one microbatch. A schedule as built holds computation
only; `communication.with_communication` adds the sends and receives. Built once, read by the static check, the
timing model, the executor and the reports.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from meshwright.layout.config import Schedule
from meshwright.schedules.placement import chunk_owner, chunks_of_stage


class ActionKind(StrEnum):
    """Computation, and the messages between it.

    SEND_FORWARD sends the output of its chunk to the next chunk's stage, RECEIVE_FORWARD receives the input of its
    chunk; SEND_BACKWARD sends the gradient of its chunk's input to the previous chunk's stage, RECEIVE_BACKWARD
    receives the gradient of its chunk's output.
    """

    FORWARD = "F"
    BACKWARD = "B"  # gradients of input and weights in one go
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    SEND_FORWARD = "SF"
    RECEIVE_FORWARD = "RF"
    SEND_BACKWARD = "SB"
    RECEIVE_BACKWARD = "RB"


SENDS = frozenset({ActionKind.SEND_FORWARD, ActionKind.SEND_BACKWARD})
RECEIVES = frozenset({ActionKind.RECEIVE_FORWARD, ActionKind.RECEIVE_BACKWARD})
COMMUNICATION = SENDS | RECEIVES
INPUT_GRADIENTS = frozenset({ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT})
"""Kinds that produce the gradient of a chunk's input."""


@dataclass(frozen=True, order=True, slots=True)
class Action:
    """One step of a stage. `chunk` is in model order over the whole pipeline."""

    kind: ActionKind
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.chunk}.{self.microbatch}"


@dataclass(frozen=True)
class PipelineSchedule:
    """The ordered actions of every stage. `chunks` is per stage (vpp)."""

    schedule: Schedule
    stages: int
    microbatches: int
    chunks: int
    v_shaped: bool
    forward_only: bool
    actions: tuple[tuple[Action, ...], ...]

    @property
    def total_chunks(self) -> int:
        return self.stages * self.chunks

    def owner(self, chunk: int) -> int:
        """The stage that holds a chunk."""
        return chunk_owner(chunk, self.stages, self.chunks, self.v_shaped)

    def chunks_of(self, stage: int) -> tuple[int, ...]:
        """The chunks of a stage, in model order."""
        return chunks_of_stage(stage, self.stages, self.chunks, self.v_shaped)

    def sends_forward(self, chunk: int) -> bool:
        """Whether a chunk's output goes to another stage (a V turns on its own; the last chunk has no next)."""
        return chunk + 1 < self.total_chunks and self.owner(chunk) != self.owner(chunk + 1)

    def peer(self, action: Action) -> int:
        """The stage at the other end of a send or receive."""
        if action.kind in (ActionKind.SEND_FORWARD, ActionKind.RECEIVE_BACKWARD):
            return self.owner(action.chunk + 1)
        if action.kind in (ActionKind.RECEIVE_FORWARD, ActionKind.SEND_BACKWARD):
            return self.owner(action.chunk - 1)
        raise ValueError(f"{action} is computation: it has no peer")


def message_of(send: Action) -> Action:
    """The receive that a send meets."""
    if send.kind is ActionKind.SEND_FORWARD:
        return Action(ActionKind.RECEIVE_FORWARD, send.chunk + 1, send.microbatch)
    if send.kind is ActionKind.SEND_BACKWARD:
        return Action(ActionKind.RECEIVE_BACKWARD, send.chunk - 1, send.microbatch)
    raise ValueError(f"{send} is not a send")
