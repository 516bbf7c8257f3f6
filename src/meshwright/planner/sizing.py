"""How many GPUs: the same cluster at another size, whether anything fits on it, and the fewest GPUs that do.

"Fits" is the memory model's answer for the most frugal ways to run (micro batch 1, whole-layer recomputation, sharded
state), so a yes names a configuration and a no means that only exotic settings could be smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from meshwright.cost.evaluate import evaluate
from meshwright.cost.stack import Stack
from meshwright.cost.workload import Workload
from meshwright.hardware.load import resize
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import HybridParallelConfig, Recompute, Schedule
from meshwright.models.spec import ModelSpec
from meshwright.planner.constraints import Constraints
from meshwright.planner.enumerate import space

MOST_GPUS = 2**17
STEPS_PER_DOUBLING = 16
"""Above one node, GPU counts are tried in steps of a sixteenth of a doubling."""


@dataclass(frozen=True)
class Smallest:
    """The configuration of least memory, whether it fits or not. `capacity_bytes` is the device's whole memory: the
    reserved part is counted in `memory_bytes`."""

    config: HybridParallelConfig
    memory_bytes: int
    capacity_bytes: int

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.capacity_bytes

    @property
    def missing_bytes(self) -> int:
        return max(0, self.memory_bytes - self.capacity_bytes)


def frugal(constraints: Constraints) -> Constraints:
    """The user's constraints, and where they left a choice the settings that need least memory."""

    fixed = constraints
    return replace(
        fixed,
        micro_batch=fixed.micro_batch or (1,),
        zero=fixed.zero or (0, 1, 2, 3),
        schedule=fixed.schedule or (Schedule.ONE_F_ONE_B,),
        recompute=fixed.recompute or (Recompute.NONE, Recompute.FULL),
        recompute_every=fixed.recompute_every or (1,),
    )


def smallest(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    global_batch: int,
    constraints: Constraints,
    stack: Stack,
) -> Smallest | None:
    """The configuration of least memory on all GPUs of the cluster; None where no configuration is legal."""
    best: Smallest | None = None
    configurations = space(model, cluster, workload.seq, cluster.gpus, global_batch, frugal(constraints))
    for _, chunk in configurations.chunks():
        memory = evaluate(model, cluster, workload, chunk, stack=stack, prune=False).memory_bytes
        row = int(np.argmin(memory))
        if best is None or memory[row] < best.memory_bytes:
            best = Smallest(chunk.config(row), int(memory[row]), cluster.accelerator.memory_bytes)
    return best


def fewest_gpus(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    global_batch: int,
    constraints: Constraints,
    stack: Stack,
    most: int = MOST_GPUS,
) -> Smallest | None:
    """The least number of GPUs (at most `most`) on which some configuration fits, and that configuration."""
    last_too_small = 0
    for gpus in _doublings(cluster.gpus_per_node, most):
        found = smallest(model, resize(cluster, gpus=gpus), workload, global_batch, constraints, stack)
        if found is None or not found.fits:
            last_too_small = gpus
            continue
        for between in _between(last_too_small, gpus, cluster.gpus_per_node):
            nearer = smallest(model, resize(cluster, gpus=between), workload, global_batch, constraints, stack)
            if nearer is not None and nearer.fits:
                return nearer
        return found
    return None


def _doublings(gpus_per_node: int, most: int) -> Iterator[int]:
    """1, 2, 4 ... within a node, then whole nodes, doubling."""
    gpus = 1
    while gpus < gpus_per_node and gpus <= most:
        yield gpus
        gpus *= 2
    gpus = gpus_per_node
    while gpus <= most:
        yield gpus
        gpus *= 2


def _between(low: int, high: int, gpus_per_node: int) -> list[int]:
    """Counts to try between a size that is too small and one that fits: whole nodes, rising."""
    step = max(gpus_per_node, high // STEPS_PER_DOUBLING // gpus_per_node * gpus_per_node)
    return list(range(low + step, high, step)) if low >= gpus_per_node else []
