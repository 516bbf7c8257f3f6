"""What a simulation gives: spans on the streams of every pipeline stage, the step, and what each axis exposes of it.

A stage is shown by one of its ranks: all ranks of a stage do the same at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Stream(StrEnum):
    """Where a span runs. Streams of one rank run at the same time."""

    COMPUTE = "compute"
    TP = "tp"
    CP = "cp"
    EP = "ep"
    SEND = "pp send"
    DP = "dp"


IN_LAYER = (Stream.TP, Stream.CP, Stream.EP)


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that a stage does. `exposed_s` is the part of a message's seconds that compute waits for."""

    stage: int
    stream: Stream
    name: str
    start_s: float
    end_s: float
    exposed_s: float = 0.0


@dataclass(frozen=True)
class Exposure:
    """Communication of one axis: seconds on the busiest stage's wires, and by how much the step would be shorter
    without them."""

    wire_s: float
    exposed_s: float


@dataclass(frozen=True)
class StepTimeline:
    """A step: spans in order of stage and start. `tail_s` is what follows the last span on all ranks alike: fixed host
    time, stalls, waiting for the slowest node."""

    stages: int
    microbatches: int
    spans: tuple[Span, ...]
    tail_s: float
    exposed: dict[str, Exposure]

    @property
    def replayed_s(self) -> float:
        """Seconds until the last span ends."""
        return max((span.end_s for span in self.spans), default=0.0)

    @property
    def step_s(self) -> float:
        return self.replayed_s + self.tail_s

    @property
    def bubble_fraction(self) -> float:
        """Idle share of the compute streams until the last span ends, over all stages."""
        total = self.stages * self.replayed_s
        busy = sum(s.end_s - s.start_s for s in self.spans if s.stream is Stream.COMPUTE)
        return 1.0 - busy / total if total > 0 else 0.0

    def of_stage(self, stage: int) -> tuple[Span, ...]:
        return tuple(span for span in self.spans if span.stage == stage)
