"""Results of the cost model: `Evaluation` for many candidates (arrays), `Estimate` for one, in full detail.

`evaluate` is the one code path; `estimate` is the case of one candidate with its parts spelled out.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.cost.candidates import BoolArray, Candidates, FloatArray, IntArray
from meshwright.cost.confidence import Confidence
from meshwright.layout.config import HybridParallelConfig
from meshwright.ledger import MemoryKind, TrafficEntry


@dataclass(frozen=True)
class StageMemory:
    """Bytes by kind on one rank of a pipeline stage."""

    stage: int
    bytes_by_kind: dict[MemoryKind, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_by_kind.values())


@dataclass(frozen=True)
class Memory:
    """Memory of every distinct stage; the peak is the fullest of them."""

    stages: tuple[StageMemory, ...]
    capacity_bytes: int

    @property
    def peak(self) -> StageMemory:
        return max(self.stages, key=lambda s: s.total_bytes)

    @property
    def fits(self) -> bool:
        return self.peak.total_bytes <= self.capacity_bytes


TIME_PARTS = (
    "forward",  # products, attention and element-wise work of the forward pass, slowest stage
    "backward",
    "recompute",
    "tp",  # exposed: not hidden behind compute
    "cp",
    "ep",
    "pp",
    "dp",
    "bubble",
    "optimizer",
    "host",  # launch-bound time and fixed overheads
)
"""Where the seconds of a step go; the parts sum to the step."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by part (keys TIME_PARTS) and, beside them, communication hidden behind compute by axis."""

    parts_s: dict[str, float]
    hidden_s: dict[str, float]

    @property
    def step_s(self) -> float:
        return sum(self.parts_s.values())


@dataclass(frozen=True)
class Throughput:
    """Rates of one step. `mfu` counts model FLOPs with full (non-causal) attention, `mfu_causal` half of it; `hfu` adds
    recomputation (Korthikanti et al. 2022, section 6)."""

    tokens_per_s: float
    tokens_per_s_per_gpu: float
    model_tflops_per_gpu: float
    hardware_tflops_per_gpu: float
    mfu: float
    mfu_causal: float
    hfu: float


@dataclass(frozen=True)
class Estimate:
    """Everything the cost model says of one configuration. `traffic` maps a distinct stage to its ledger lines."""

    config: HybridParallelConfig
    memory: Memory
    traffic: dict[int, tuple[TrafficEntry, ...]]
    time: StepTime
    throughput: Throughput
    confidence: Confidence
    efficiency: dict[str, float]  # factor lost to each of tp, cp, ep, pp, dp, recompute, kernels; product = mfu


@dataclass(frozen=True)
class Evaluation:
    """Arrays [n] over candidates. Where the search asked to prune, rows that do not fit have step_s = inf, and their
    memory_bytes may be a lower bound that already exceeds the device."""

    candidates: Candidates
    memory_bytes: FloatArray
    peak_stage: IntArray
    fits: BoolArray
    step_s: FloatArray
    parts_s: dict[str, FloatArray]
    tokens_per_s_per_gpu: FloatArray
    mfu: FloatArray
