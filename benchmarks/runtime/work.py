"""What is measured: the models and batches, and the layouts that run them with their limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, MixtralConfig

from meshwright.layout.config import HybridParallelConfig, Precision, Schedule
from meshwright.schedules.closed_form import bubble_fraction

CPU_LIMIT = 1.10
"""Of the plain process's CPU seconds divided by the ranks."""
CPU_LIMIT_8_RANKS = 1.15
WALL_LIMIT = 1.08
"""Of the wall seconds of one plain process that has both cores; of a pipeline, of its schedule's ideal."""


@dataclass(frozen=True)
class Work:
    """A model and its batch, of tokens drawn from a fixed seed."""

    model: Any
    sequences: int
    seq: int

    def batch(self) -> tuple[Tensor, Tensor]:
        drawn = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.model.vocab_size, (self.sequences, self.seq + 1), generator=drawn)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def llama(seq: int) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=8,
        hidden_size=512,
        intermediate_size=1376,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=8192,
        max_position_embeddings=seq,
        tie_word_embeddings=False,
    )


def mixtral(seq: int) -> MixtralConfig:
    return MixtralConfig(
        num_hidden_layers=4,
        hidden_size=512,
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=8192,
        max_position_embeddings=seq,
        tie_word_embeddings=False,
    )


WORKS = {
    "llama": Work(llama(512), 8, 512),
    "llama at 2048": Work(llama(2048), 2, 2048),
    "mixtral": Work(mixtral(512), 8, 512),
}


@dataclass(frozen=True)
class Layout:
    """A plan for a work. `cpu_limit` None: only reported. `wall_ideal` gives the ideal wall seconds from those of one
    plain process with one core and with both (None: no limit on wall time). `peers`: who runs the same layout."""

    work: str
    config: HybridParallelConfig
    cpu_limit: float | None = None
    wall_ideal: Callable[[float, float], float] | None = None
    peers: tuple[str, ...] = ()


def plan(**sizes: Any) -> HybridParallelConfig:
    defaults: dict[str, Any] = {"global_batch": 8, "precision": Precision.FP32}
    return HybridParallelConfig(**(defaults | sizes))


def both_cores(_one_core_s: float, both_cores_s: float) -> float:
    return both_cores_s


def pipeline(microbatches: int, schedule: Schedule = Schedule.ONE_F_ONE_B) -> Callable[[float, float], float]:
    """An even share and the bubble that the schedule has on two even stages: (m + 1) / m with 1F1B."""
    busy = 1 - float(bubble_fraction(list(Schedule).index(schedule), 2, microbatches, 1))
    return lambda one_core_s, _both_cores_s: one_core_s / 2 / busy


SPLIT = (5, 3)
"""Decoder layers of the two stages: the head costs about 1.5 layers."""


def zero_bubble(microbatches: int) -> Layout:
    """ZB-H1, which fills 1F1B's bubble with weight gradients and holds as many activations."""
    config = plan(pp=2, micro_batch=8 // microbatches, layer_split=SPLIT, schedule=Schedule.ZB_H1)
    ideal = pipeline(microbatches, Schedule.ZB_H1)
    return Layout("llama", config, None, ideal, (f"deepspeed-pipeline-{microbatches}",))


LAYOUTS = {
    # two microbatches: the whole batch at once would hold 8 MiB per activation, which costs tp2 a tenth (docs/log.md)
    "tp2": Layout("llama", plan(tp=2, micro_batch=4), CPU_LIMIT, both_cores, ("deepspeed-autotp", "tp_plan")),
    "tp2-whole-batch": Layout("llama", plan(tp=2, micro_batch=8)),
    "tp2-sequence-parallel": Layout("llama", plan(tp=2, micro_batch=4, sequence_parallel=True)),
    "pp2": Layout(
        "llama", plan(pp=2, micro_batch=1, layer_split=SPLIT), CPU_LIMIT, pipeline(8), ("deepspeed-pipeline-8",)
    ),
    "pp2-2-microbatches": Layout(
        "llama", plan(pp=2, micro_batch=4, layer_split=SPLIT), None, pipeline(2), ("deepspeed-pipeline-2",)
    ),
    "pp2-zero-bubble": zero_bubble(8),
    "pp2-2-microbatches-zero-bubble": zero_bubble(2),
    "dp2": Layout("llama", plan(dp=2, micro_batch=4), CPU_LIMIT, both_cores, ("deepspeed-zero0",)),
    "dp2-zero1": Layout("llama", plan(dp=2, micro_batch=4, zero=1), peers=("deepspeed-zero1",)),
    "dp2-zero2": Layout("llama", plan(dp=2, micro_batch=4, zero=2), peers=("deepspeed-zero2",)),
    "dp2-zero3": Layout("llama", plan(dp=2, micro_batch=4, zero=3), peers=("deepspeed-zero3",)),
    "tp2-pp2-dp2": Layout("llama", plan(tp=2, pp=2, dp=2, micro_batch=1, layer_split=SPLIT), CPU_LIMIT_8_RANKS),
    # half the calls of the above, a larger bubble: CPU seconds do not see the latter
    "tp2-pp2-dp2-2-microbatches": Layout(
        "llama", plan(tp=2, pp=2, dp=2, micro_batch=2, layer_split=SPLIT), CPU_LIMIT_8_RANKS
    ),
    "ep2": Layout("mixtral", plan(dp=2, ep=2, micro_batch=4)),
    "cp2": Layout("llama at 2048", plan(cp=2, global_batch=2, micro_batch=2)),
}
DEFAULT = tuple(name for name in LAYOUTS if not name.startswith("tp2-whole") and not name.startswith("tp2-seq"))
