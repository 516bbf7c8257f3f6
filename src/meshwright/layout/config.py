"""The parallel configuration: how many ways each axis splits the job, and how the step is run.

`HybridParallelConfig` is the one description of a split that every other part reads: pure data, checked
for self-consistency when built. Checks against a model and a cluster live in `layout.validate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Schedule(StrEnum):
    """Pipeline schedules that meshwright knows."""

    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved-1f1b"
    ZB_H1 = "zb-h1"
    ZBV = "zbv"
    DUALPIPEV = "dualpipev"


class Recompute(StrEnum):
    """What of the forward pass is computed again in the backward pass."""

    NONE = "none"
    SELECTIVE = "selective"  # core attention only (Korthikanti et al. 2022, section 5)
    FULL = "full"  # only the input of every `recompute_every`-th layer is kept


class Precision(StrEnum):
    """Number format of the matrix products (and of the stored working weights)."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"
    MXFP8 = "mxfp8"
    NVFP4 = "nvfp4"


AXES = ("dp", "pp", "cp", "tp")
"""Axes of the dense mesh, outermost first. `ep` and `expert_tp` overlay dp x cp x tp within a stage."""


@dataclass(frozen=True)
class HybridParallelConfig:
    """Sizes of every axis and the way a training step is run. All sizes are counts of ranks.

    world size = dp * pp * cp * tp. Within one pipeline stage the dp * cp * tp ranks are regrouped for
    expert layers as expert_dp * ep * expert_tp.

    `zero_shards` is the number of dp x cp ranks that sharded state is spread over (None: all of them; less
    is HSDP: sharded within, replicated across). `recompute_every` = n recomputes one layer of every n.
    `layer_split` gives the decoder layers of each of the pp * vpp chunks in model order (None: even).
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    expert_tp: int = 1
    vpp: int = 1
    sequence_parallel: bool = False
    micro_batch: int = 1
    global_batch: int = 1
    schedule: Schedule = Schedule.ONE_F_ONE_B
    zero: int = 0
    zero_shards: int | None = None
    recompute: Recompute = Recompute.NONE
    recompute_every: int = 1
    precision: Precision = Precision.BF16
    layer_split: tuple[int, ...] | None = None

    @property
    def world_size(self) -> int:
        return self.dp * self.pp * self.cp * self.tp

    @property
    def expert_dp(self) -> int:
        """Replicas of each expert shard within a pipeline stage."""
        return self.dp * self.cp * self.tp // (self.ep * self.expert_tp)

    @property
    def num_microbatches(self) -> int:
        """Microbatches that each dp replica runs per step."""
        return self.global_batch // (self.dp * self.micro_batch)
