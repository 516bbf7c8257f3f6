"""What was measured on a machine or in a run, as plain data: written where torch is, read where it is not.

`MachineSamples` and `LinkSample` come from `meshwright calibrate` and `meshwright doctor links`; the doctor turns them
into a cluster file. Times are medians, in seconds. `RankTimeline` comes from `meshwright train --trace`: one step of
one rank, in seconds since the epoch by that machine's clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ProductSample:
    """One product [m, k] x [k, n] in a precision, with every process of the machine at it."""

    precision: str
    m: int
    n: int
    k: int
    seconds: float


@dataclass(frozen=True)
class LayerJob:
    """A Llama of a size, in fp32, one microbatch after another on one rank: a training step without axes."""

    hidden: int
    layers: int
    seq: int
    micro_batch: int
    microbatches: int = 2

    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.hidden * 11 // 4,
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(2, self.hidden // 32),
            "num_key_value_heads": max(1, self.hidden // 64),
            "head_dim": 32,
            "vocab_size": 264,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
        }


@dataclass(frozen=True)
class StepSample:
    """Seconds that a rank computed in a step of a job, with every process of the machine at it."""

    job: LayerJob
    step_s: float


@dataclass(frozen=True)
class MachineSamples:
    """What one machine computes. `copy_bytes_per_s` counts bytes read and written, per process; `resident_bytes` is
    what a rank holds before it has a model; `memory_bytes` is the machine's memory."""

    host: str
    software: str
    processes: int
    products: tuple[ProductSample, ...]
    copy_bytes_per_s: float
    steps: tuple[StepSample, ...]
    resident_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class LinkSample:
    """One collective on one group, all groups of its axis at it at the same time. `axis` is 'pair' for two ranks by
    themselves. `call_bytes` as in ledger.py; `hosts` of the group's ranks, each named once."""

    axis: str
    collective: str
    ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    call_bytes: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        return self.call_bytes / self.seconds


@dataclass(frozen=True)
class LinkSamples:
    """All links of a job: who ran where (host of every rank), and what each group reached."""

    hosts: tuple[str, ...]
    samples: tuple[LinkSample, ...]
    software: str = ""


@dataclass(frozen=True, slots=True)
class TimedWork:
    """What a rank computed: 'F', 'B', 'I' or 'W' of a chunk and microbatch (schedules.actions), or 'optimizer'."""

    kind: str
    chunk: int
    microbatch: int
    start_s: float
    end_s: float

    @property
    def name(self) -> str:
        return self.kind if self.chunk < 0 else f"{self.kind}{self.chunk}.{self.microbatch}"


@dataclass(frozen=True, slots=True)
class TimedCall:
    """A collective or message from the moment it was issued until it was over: told by the backend, or seen when the
    rank stopped waiting for it (None: never seen). `waits`: when the rank stood in it, or waited for it. `ranks` of the
    group in axis order; `peer`: global rank at the other end of a message, else -1."""

    axis: str
    ranks: tuple[int, ...]
    collective: str
    phase: str
    what: str
    call_bytes: int
    peer: int
    issued_s: float
    ended_s: float | None
    waits: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class RankTimeline:
    """One step of a rank; `step` is counted from 1."""

    rank: int
    stage: int
    step: int
    start_s: float
    end_s: float
    work: tuple[TimedWork, ...]
    calls: tuple[TimedCall, ...]
