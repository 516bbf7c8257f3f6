"""`recommend_parallelism_config`: the best dp x pp x tp for a model given by its size, on GPUs given by their memory.

In: the guide's five numbers. Out: a `Recommendation`, which unpacks as (tp, pp, dp) and holds the estimate behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from meshwright import hardware
from meshwright.cost.estimate import Estimate
from meshwright.cost.stack import default_stack
from meshwright.cost.workload import Workload
from meshwright.errors import InputError, is_number
from meshwright.hardware import Cluster
from meshwright.models.shapes import typical_shape
from meshwright.models.spec import ModelSpec
from meshwright.planner.constraints import Constraints
from meshwright.planner.explain import bound_of
from meshwright.planner.objectives import Objective
from meshwright.planner.search import search
from meshwright.planner.shortfall import shortfall

GPUS_PER_NODE = 8
SEQUENCES_PER_GPU = 8
"""Global batch where none is given: enough microbatches that a pipeline of the usual depth fills."""
ALTERNATIVES = 5


@dataclass(frozen=True)
class Recommendation:
    """A split that fits, by the memory model. Unpacks as `tp, pp, dp`: the order in which the guide's function returned
    them (its docstring says dp, tp, pp). `runners_up` are the next best meshes."""

    model: ModelSpec
    cluster: Cluster
    best: Estimate
    runners_up: tuple[Estimate, ...]
    reason: str
    unused_gpus: int = 0

    @property
    def tp_size(self) -> int:
        return self.best.config.tp

    @property
    def pp_size(self) -> int:
        return self.best.config.pp

    @property
    def dp_size(self) -> int:
        return self.best.config.dp

    @property
    def total_gpus(self) -> int:
        return self.best.config.world_size

    @property
    def efficiency(self) -> float:
        """Share of the peak FLOP/s that the model's own arithmetic reaches (MFU)."""
        return self.best.throughput.mfu

    def __iter__(self) -> Iterator[int]:
        return iter((self.tp_size, self.pp_size, self.dp_size))

    def __str__(self) -> str:
        peak = self.best.memory.peak.total_bytes / 2**30
        return (
            f"tp {self.tp_size} x pp {self.pp_size} x dp {self.dp_size} = {self.total_gpus} GPUs, "
            f"{peak:.1f} GiB of {self.best.memory.capacity_bytes / 2**30:.1f} per GPU, "
            f"{self.best.throughput.tokens_per_s_per_gpu:.0f} tokens/s per GPU; {self.reason}"
        )


def recommend_parallelism_config(
    model_params_b: float,
    num_gpus: int,
    gpu_memory_gb: float,
    gpu_interconnect: str,
    model_depth: int,
    *,
    seq_length: int = 2048,
    global_batch: int | None = None,
    accelerator: str | None = None,
) -> Recommendation:
    """The fastest training split that fits a model of `model_params_b` billion parameters and `model_depth` layers.

    `gpu_interconnect` is 'nvlink', 'infiniband' or 'ethernet'. Raises InputError where nothing fits, with what would.
    """
    model = typical_shape(model_params_b, layers=model_depth)
    return recommend(model, num_gpus, gpu_memory_gb, gpu_interconnect, seq_length, global_batch, accelerator)


def recommend(
    model: ModelSpec,
    num_gpus: int,
    gpu_memory_gb: float,
    interconnect: str,
    seq_length: int,
    global_batch: int | None = None,
    accelerator: str | None = None,
    objective: Objective = Objective.THROUGHPUT,
) -> Recommendation:
    """The best split of three axes (dp, pp, tp), as the guide's functions have it."""
    usable = whole_nodes(num_gpus)
    cluster = hardware.custom(gpu_memory_gb, interconnect, usable, accelerator=accelerator)
    workload, stack, fixed = Workload(seq=seq_length), default_stack(), Constraints(cp=(1,))
    batch = SEQUENCES_PER_GPU * usable if global_batch is None else global_batch
    found = search(model, cluster, workload, batch, objective, ALTERNATIVES + 1, fixed, stack)
    if not found.best:
        missing = shortfall(model, cluster, workload, batch, fixed, stack)
        remedies = "; ".join(remedy.sentence for remedy in missing.remedies)
        raise InputError(f"{missing.sentence}{f'; what would fit: {remedies}' if remedies else ''}")
    best, *others = found.best
    reason = bound_of(best, model, cluster).sentence
    return Recommendation(model, cluster, best, tuple(others), reason, num_gpus - usable)


def whole_nodes(num_gpus: int) -> int:
    """The GPUs of `num_gpus` that fill whole nodes (within one node, all): no group straddles a half node."""
    if not is_number(num_gpus) or num_gpus < 1:
        raise InputError(f"num_gpus must be 1 or more, got {num_gpus}")
    return num_gpus if num_gpus <= GPUS_PER_NODE else num_gpus // GPUS_PER_NODE * GPUS_PER_NODE
