"""The parallel configuration: how many ways each axis splits the job, and how the step is run.

`HybridParallelConfig` is the one description of a split that every other part reads: pure data, checked
for self-consistency when built (`layout.rules`). Checks against a model and a cluster live in `layout.validate`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from meshwright.errors import InputError, suggestion
from meshwright.layout.rules import CONSISTENCY, Sizes, first_violation


class Schedule(StrEnum):
    """Pipeline schedules that meshwright knows."""

    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved-1f1b"
    ZB_H1 = "zb-h1"
    ZBV = "zbv"
    DUALPIPEV = "dualpipev"


V_SHAPED = (Schedule.ZBV, Schedule.DUALPIPEV)
"""Schedules that give each stage one chunk on the way down and one on the way back."""


class Recompute(StrEnum):
    """What of the forward pass is computed again in the backward pass."""

    NONE = "none"
    SELECTIVE = "selective"  # core attention only (Korthikanti et al. 2022, section 5)
    FULL = "full"  # only the input of every `recompute_every`-th layer is kept


class ContextVariant(StrEnum):
    """How attention looks beyond a context-parallel rank's own tokens."""

    RING = "ring"  # keys and values travel around the ranks (Liu et al. 2023)
    ALL_TO_ALL = "all_to_all"  # tokens are exchanged for heads and back (DeepSpeed Ulysses, Jacobs et al. 2023)


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

MAX_SIZE = 10_000_000
"""Larger sizes are taken for a slip."""

SIZE_FIELDS = ("dp", "tp", "pp", "cp", "ep", "expert_tp", "vpp", "micro_batch", "global_batch", "recompute_every")

NAMED_CHOICES: tuple[tuple[str, type[StrEnum]], ...] = (
    ("schedule", Schedule),
    ("recompute", Recompute),
    ("precision", Precision),
    ("cp_variant", ContextVariant),
)


class OneMicrobatchEach(int):
    """The default global batch, dp * micro_batch: an int that follows dp and micro_batch through `replace`."""


@dataclass(frozen=True)
class HybridParallelConfig:
    """Sizes of every axis and the way a training step is run. All sizes are counts of ranks.

    world size = dp * pp * cp * tp. Within one pipeline stage the dp * cp * tp ranks are regrouped for
    expert layers as expert_dp * ep * expert_tp.

    `global_batch` left out is one microbatch for each replica. `sequence_parallel` does nothing at tp=1, `cp_variant`
    at cp=1, `zero_shards` at zero=0: all are allowed there. `zero_shards` is the number of dp x cp ranks that sharded
    state is spread over (None: all of them; less is HSDP: sharded within, replicated across). `recompute_every` = n
    recomputes one layer of every n. `layer_split` gives the decoder layers of each of the pp * vpp chunks in model
    order (None: even).
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    expert_tp: int = 1
    vpp: int = 1
    sequence_parallel: bool = False
    cp_variant: ContextVariant = ContextVariant.RING
    micro_batch: int = 1
    global_batch: int = OneMicrobatchEach(1)
    schedule: Schedule = Schedule.ONE_F_ONE_B
    zero: int = 0
    zero_shards: int | None = None
    recompute: Recompute = Recompute.NONE
    recompute_every: int = 1
    precision: Precision = Precision.BF16
    layer_split: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in SIZE_FIELDS:
            if name == "global_batch" and isinstance(self.global_batch, OneMicrobatchEach):
                object.__setattr__(self, name, OneMicrobatchEach(self.dp * self.micro_batch))
            self._set(name, whole_number(name, getattr(self, name), 1, MAX_SIZE))
        self._set("zero", whole_number("zero", self.zero, 0, 3))
        if self.zero_shards is not None:
            self._set("zero_shards", whole_number("zero_shards", self.zero_shards, 1, MAX_SIZE))
        if not isinstance(self.sequence_parallel, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"sequence_parallel must be true or false, got {self.sequence_parallel!r}")
        for name, kind in NAMED_CHOICES:
            self._set(name, one_of(name, getattr(self, name), kind))
        if self.layer_split is not None:
            split = (whole_number("layer_split", layers, 0, MAX_SIZE) for layers in self.layer_split)
            self._set("layer_split", tuple(split))
        if self.world_size > MAX_SIZE:
            raise InputError(f"dp * pp * cp * tp = {self.world_size} ranks; at most {MAX_SIZE:,} are understood")
        problem = first_violation(CONSISTENCY, self.sizes())
        if problem:
            raise InputError(problem)

    def _set(self, name: str, value: object) -> None:
        """Replace a NumPy integer, a plain string or a list by the field's own type."""
        if not isinstance(getattr(self, name), type(value)):
            object.__setattr__(self, name, value)

    @classmethod
    def of(
        cls,
        data_parallel_size: int = 1,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        context_parallel_size: int = 1,
        expert_parallel_size: int = 1,
        **others: Any,
    ) -> HybridParallelConfig:
        """The same config by its long names, as guides and frameworks spell them; `others` are plain fields."""
        return cls(
            dp=data_parallel_size,
            tp=tensor_parallel_size,
            pp=pipeline_parallel_size,
            cp=context_parallel_size,
            ep=expert_parallel_size,
            **others,
        )

    @property
    def world_size(self) -> int:
        return self.dp * self.pp * self.cp * self.tp

    @property
    def dp_size(self) -> int:
        return self.dp

    @property
    def tp_size(self) -> int:
        return self.tp

    @property
    def pp_size(self) -> int:
        return self.pp

    @property
    def expert_dp(self) -> int:
        """Replicas of each expert shard within a pipeline stage."""
        return self.dp * self.cp * self.tp // (self.ep * self.expert_tp)

    @property
    def num_microbatches(self) -> int:
        """Microbatches that each dp replica runs per step."""
        return self.global_batch // (self.dp * self.micro_batch)

    def sizes(self) -> Sizes:
        """What the rules of `layout.rules` look at."""
        return Sizes(
            **{name: getattr(self, name) for name in SIZE_FIELDS if name != "recompute_every"},
            sequence_parallel=self.sequence_parallel,
            interleaved=self.schedule is Schedule.INTERLEAVED,
            v_shaped=self.schedule in V_SHAPED,
            heads_exchanged=self.cp_variant is ContextVariant.ALL_TO_ALL,
            zero_shards=self.zero_shards or self.dp * self.cp,
            layer_split=self.layer_split,
        )

    def get_rank_mapping(self, global_rank: int) -> tuple[int, int, int]:
        """(dp rank, tp rank, pp rank) of a global rank in the default order. For cp and other orders: `RankLayout`."""
        rank = whole_number("rank", global_rank, 0, self.world_size - 1)
        place: dict[str, int] = {}
        for axis in reversed(AXES):
            rank, place[axis] = divmod(rank, getattr(self, axis))
        return place["dp"], place["tp"], place["pp"]

    def get_global_rank(self, dp_rank: int, tp_rank: int, pp_rank: int, cp_rank: int = 0) -> int:
        """The global rank of a place in the default order."""
        place = {"dp": dp_rank, "pp": pp_rank, "cp": cp_rank, "tp": tp_rank}
        rank = 0
        for axis in AXES:
            size: int = getattr(self, axis)
            rank = rank * size + whole_number(f"{axis} rank", place[axis], 0, size - 1)
        return rank

    def visualize(self, gpus_per_node: int = 8) -> None:
        """Print the rank map."""
        from meshwright.layout.draw import rank_map  # draw needs this class

        print(rank_map(self, gpus_per_node=gpus_per_node))


def whole_number(name: str, value: Any, least: int, most: int) -> int:
    """`value` as an int within bounds (NumPy integers too; not bool, text or float), else an InputError."""
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be a whole number, got {value!r}") from None
    if isinstance(value, bool):
        raise InputError(f"{name} must be a whole number, got {value!r}")
    if not least <= number <= most:
        raise InputError(f"{name} must be between {least} and {most:,}, got {_short(number)}")
    return number


def _short(number: int) -> str:
    return str(number) if abs(number) < 10**18 else f"a number of {number.bit_length()} bits"


def one_of(name: str, value: Any, kind: type[StrEnum]) -> StrEnum:
    """The member of `kind` that `value` is or spells, else an InputError."""
    try:
        return kind(value)
    except ValueError:
        hint = suggestion(str(value)[:40], list(kind)) or f"; choose {', '.join(kind)}"
        raise InputError(f"unknown {name} {str(value)[:40]!r}{hint}") from None
