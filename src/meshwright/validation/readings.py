"""How a measurement row's words and gaps are read: every default that stands in for "the source does not say".

In: fields of a row. Out: knobs of a configuration or workload, with a note of each assumption made. Only what a row
says about the job is read - its numbers, its framework, its stated details - never who published it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from meshwright.layout.config import Precision, Recompute, Schedule
from meshwright.models.fields import Fields


@dataclass(frozen=True)
class RecomputeReading:
    """Recompute settings that the row may mean, to be tried in order until one fits the device's memory."""

    choices: tuple[tuple[Recompute, int], ...]  # (mode, one layer of every n)
    note: str | None = None

    @property
    def stated(self) -> bool:
        return len(self.choices) == 1


UNKNOWN_RECOMPUTE = ((Recompute.NONE, 1), (Recompute.SELECTIVE, 1), (Recompute.FULL, 1))

PARTIAL: tuple[tuple[str, tuple[tuple[Recompute, int], ...]], ...] = (
    # words in `recompute_detail` -> nearest modes of ours, by the products computed again; the first match counts
    ("core", ((Recompute.SELECTIVE, 1),)),
    ("2nd layer full", ((Recompute.FULL, 2),)),
    ("fraction of blocks", ((Recompute.FULL, 1),)),
    ("op-level", ((Recompute.FULL, 2),)),  # every other product: about half of a layer
)
"""Partial recompute that one of our modes comes near to. Anything else (norms, activation functions, the up-projection
of MLA, a part of an expert layer) costs next to no products: the least mode that fits."""


def recompute(row: Fields) -> RecomputeReading:
    """`recompute`, in the light of `recompute_detail`."""
    mode, detail = row.text("recompute"), row.text("recompute_detail").lower()
    if mode == Recompute.SELECTIVE and not detail and "torchtitan" in row.text("framework").lower():
        detail = "op-level"  # what torchtitan means by selective unless told otherwise
    if counted := re.search(r"recomputes (\d+) of (\d+) layers", detail):
        some, of = int(counted[1]), int(counted[2])
        return RecomputeReading(((Recompute.FULL, max(1, round(of / max(some, 1)))),))
    if not mode:
        return RecomputeReading(UNKNOWN_RECOMPUTE, "recompute: the least that fits")
    if mode not in tuple(Recompute):
        raise row.error(f"recompute must be none, selective or full, got {mode[:40]!r}")
    if mode == Recompute.SELECTIVE and detail:
        nearest = next((modes for words, modes in PARTIAL if words in detail), UNKNOWN_RECOMPUTE)
        names = " or ".join(f"{m}" if n == 1 else f"{m} every {n}" for m, n in nearest)
        return RecomputeReading(nearest, f"recompute: {names} for {detail[:60]!r}")
    return RecomputeReading(((Recompute(mode), 1),))


EARLY_STACKS = frozenset({"megatron-lm", "megatron-deepspeed", "deepspeed-zero3"})
EARLY_CHIPS = frozenset({"volta", "ampere"})


def is_early_megatron(stack: str, architecture: str, precision: Precision) -> bool:
    """Megatron and its forks as of 2019 to 2022, before flash attention (Dao et al. 2022): those chips, and for
    Megatron-LM itself, which lived on, fp16."""
    if stack not in EARLY_STACKS or architecture not in EARLY_CHIPS:
        return False
    return stack != "megatron-lm" or precision is Precision.FP16


def flash_attention(row: Fields, early: bool) -> bool:
    """Whether attention runs in a fused kernel that never stores the scores; where nothing is said, in all but early
    software."""
    kernel = row.text("attention_impl").lower()
    if kernel:
        return kernel not in ("torch", "fused", "eager", "math", "unfused")
    return not early and "no flash" not in row.text("notes").lower()


KERNELS = (
    # words in `attention_impl` -> kernel generation of cost.attention; the first match counts
    ("flash-3", "flash3"),
    ("attention3", "flash3"),
    ("attentionv1", "flash1"),
    ("triton", "flash1"),  # the Triton kernel of flash attention's first version
    ("attention2", "flash2"),
    ("attention-2", "flash2"),
    ("flash-2", "flash2"),
    ("cudnn", "cudnn"),
    ("te)", "cudnn"),  # Transformer Engine calls cuDNN
)


def attention_kernel(row: Fields) -> str | None:
    """The generation of the flash kernel, where the row names it; 'eager' for attention of separate kernels."""
    words = row.text("attention_impl").lower()
    return next((kernel for name, kernel in KERNELS if name in words), None)


def device_memory_stated(row: Fields) -> bool:
    """Whether the device's memory size is known, so that the row can tell whether a fit was predicted rightly."""
    return "memory size inferred" not in row.text("bw_source")


def fused_norm(row: Fields) -> bool | None:
    """Whether norms run in a kernel of their own, where the row names its kernels."""
    words = row.text("attention_impl").lower()
    return "rms kernel" in words if "flash_attention" in words or words in ("torch", "fused") else None


def gradient_bytes(row: Fields, precision: Precision, usual: int) -> int:
    """Bytes of an accumulated (and reduced) gradient element: as the row says, else as the stack does."""
    if precision is Precision.FP32:
        return 4
    notes = row.text("notes")
    return 2 if "fp16 grad accumulation" in notes or "PURE mixed precision" in notes else usual


def capacity_factor(row: Fields) -> float | None:
    """Tokens per expert over the mean beyond which they are dropped; None for dropless."""
    dropped = "moe_token_drop" in (row.texts("flags") or [])
    return 1.0 if dropped or "capacity factor 1" in row.text("notes") else None


def schedule(row: Fields, pp: int, vpp: int) -> Schedule:
    """1F1B where the source does not say; interleaved where a stage has several chunks."""
    if pp == 1 or vpp == 1:
        return Schedule.GPIPE if row.text("schedule").lower() in ("gpipe", "afab") else Schedule.ONE_F_ONE_B
    return Schedule.INTERLEAVED


@dataclass(frozen=True)
class ZeroReading:
    """ZeRO stage, the ranks that share the state (None: all replicas), and what was assumed."""

    stage: int
    shards: int | None = None
    note: str | None = None


def zero(row: Fields, replicas: int, pp: int, node: int) -> ZeroReading:
    """'fsdp' shards everything, 'hsdp' within a group. The group is the one that the notes give; for hsdp, else a node.

    Under a pipeline FSDP keeps gathered weights and whole gradients between microbatches (torchtitan's default policy;
    gathering for each would be ruinous): as ZeRO-1, or 2 where the notes say that gradients are sharded.
    """
    value = row.values.get("zero")
    if isinstance(value, str) and value not in ("fsdp", "hsdp"):
        raise row.error(f"zero must be 0 to 3, 'fsdp' or 'hsdp', got {value[:40]!r}")
    if value is None:
        return ZeroReading(0, None, "zero: 0")
    stage = 3 if isinstance(value, str) else row.size("zero", least=0, most=3)
    notes, note = row.text("notes"), None
    stated = re.search(r"(?:shard|zero1) group[ =]*(\d+)", notes)
    group = int(stated[1]) if stated else node if value == "hsdp" else replicas
    shards = max(d for d in range(1, min(max(group, 1), replicas) + 1) if replicas % d == 0)
    if value == "hsdp" and not stated:
        note = f"zero: hsdp shard group of {shards}"
    if "not resharded" in notes:
        stage = 2
    elif isinstance(value, str) and pp > 1:
        stage, note = 1, "zero: fsdp under a pipeline as ZeRO-1"
    return ZeroReading(stage, shards if shards < replicas and stage else None, note)


class MemoryBasis(StrEnum):
    """What a published memory figure counts: tensors, what the allocator reserved for them, or all that the driver sees
    (nvidia-smi: context and communicators too)."""

    ALLOCATED = "allocated"
    RESERVED = "reserved"
    DEVICE = "device"


@dataclass(frozen=True)
class MemoryReading:
    """What the published memory number counts, and the stage it was taken on (None: the fullest; -1: the last)."""

    stage: int | None
    basis: MemoryBasis


def memory_kind(row: Fields) -> MemoryReading:
    """`mem_kind`. Where it says nothing, the allocated peak on the fullest rank."""
    words = row.text("mem_kind").lower()
    stage = -1 if "last rank" in words else 0 if "rank 0" in words or "rank0" in words else None
    if "nvidia-smi" in words:
        return MemoryReading(stage, MemoryBasis.DEVICE)
    # torchtitan prints the allocator's reserved peak; a 'max memory' that differs by half between equal jobs is one too
    reserved = "reserved" in words or "torchtitan" in words or ("max memory" in words and "alloc" not in words)
    return MemoryReading(stage, MemoryBasis.RESERVED if reserved else MemoryBasis.ALLOCATED)
