"""When nothing fits: by how much the best attempt misses, and the nearest changes with which something would fit.

Every remedy was checked with the memory model and names a configuration that fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from meshwright.cost.stack import Stack
from meshwright.cost.workload import Optimizer, Workload
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import HybridParallelConfig
from meshwright.models.spec import ModelSpec
from meshwright.planner.constraints import Constraints
from meshwright.planner.sizing import Smallest, fewest_gpus, smallest

GIB = 2**30
SHORTEST_SEQ = 128


@dataclass(frozen=True)
class Remedy:
    """A change after which `config` fits."""

    sentence: str
    config: HybridParallelConfig
    gpus: int


@dataclass(frozen=True)
class Shortfall:
    """`nearest` is the configuration of least memory on these GPUs, None where no configuration is legal at all."""

    nearest: Smallest | None
    remedies: tuple[Remedy, ...]
    sentence: str


def shortfall(
    model: ModelSpec, cluster: Cluster, workload: Workload, global_batch: int, constraints: Constraints, stack: Stack
) -> Shortfall:
    """Why nothing fits, and what would."""
    nearest = smallest(model, cluster, workload, global_batch, constraints, stack)
    remedies = tuple(_remedies(model, cluster, workload, global_batch, constraints, stack))
    if nearest is None:
        return Shortfall(None, remedies, f"no legal configuration of {cluster.gpus} GPUs and batch {global_batch}")
    sentence = (
        f"nothing fits: the smallest needs {nearest.memory_bytes / GIB:.1f} GiB of {nearest.capacity_bytes / GIB:.1f} "
        f"GiB per GPU, {nearest.missing_bytes / GIB:.1f} GiB too much"
    )
    return Shortfall(nearest, remedies, sentence)


def _remedies(
    model: ModelSpec, cluster: Cluster, workload: Workload, global_batch: int, fixed: Constraints, stack: Stack
) -> Iterator[Remedy]:
    for name in fixed.fixed:
        freed = replace(fixed, **{name: None})
        found = smallest(model, cluster, workload, global_batch, freed, stack)
        if found is not None and found.fits:
            value = getattr(found.config, name)
            shown = getattr(value, "value", value)
            yield Remedy(f"let the search choose {name} ({shown} fits)", found.config, cluster.gpus)
    seq = workload.seq // 2
    while seq >= SHORTEST_SEQ:
        found = smallest(model, cluster, replace(workload, seq=seq), global_batch, fixed, stack)
        if found is not None and found.fits:
            yield Remedy(f"sequences of {seq} tokens instead of {workload.seq}", found.config, cluster.gpus)
            break
        seq //= 2
    if workload.optimizer is not Optimizer.ADAM_8BIT:
        lighter = replace(workload, optimizer=Optimizer.ADAM_8BIT)
        found = smallest(model, cluster, lighter, global_batch, fixed, stack)
        if found is not None and found.fits:
            yield Remedy("optimizer state in 8 bits (adam-8bit)", found.config, cluster.gpus)
    found = fewest_gpus(model, cluster, workload, global_batch, fixed, stack)
    if found is not None and found.config.world_size > cluster.gpus:
        gpus = found.config.world_size
        yield Remedy(f"{gpus} GPUs instead of {cluster.gpus}", found.config, gpus)
