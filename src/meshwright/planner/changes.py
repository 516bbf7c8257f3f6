"""What one change would bring: the best plan searched again with more memory, faster links, more GPUs, a larger batch.

In: a search's question and its winner. Out: `Change`s, the most helpful first. Each is a search of the winner's
neighbourhood (tp, pp and cp at most a factor of two away; everything else free), so a gain is one that a plan reaches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from meshwright.cost.estimate import Estimate
from meshwright.cost.stack import Stack
from meshwright.cost.workload import Workload
from meshwright.hardware.load import MAX_GPUS, resize
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import HybridParallelConfig, Precision
from meshwright.models.spec import ModelSpec
from meshwright.planner.constraints import Constraints
from meshwright.planner.enumerate import context_sizes, space
from meshwright.planner.explore import explore
from meshwright.planner.objectives import Objective, ranked

FACTOR = 2
"""Every hardware-side change is a doubling."""


@dataclass(frozen=True)
class Change:
    """`gain` is the speed per GPU after the change over the speed before (1.08: eight percent), `total_gain` that of
    the whole job. `kind` is 'hardware', 'job' or 'precision'."""

    name: str
    kind: str
    gain: float
    total_gain: float
    config: HybridParallelConfig
    sentence: str


@dataclass(frozen=True)
class Variant:
    """The question with one thing changed."""

    name: str
    kind: str
    cluster: Cluster
    global_batch: int
    constraints: Constraints


def changes(
    model: ModelSpec, cluster: Cluster, workload: Workload, winner: Estimate, constraints: Constraints, stack: Stack
) -> tuple[Change, ...]:
    """All single changes, the largest gain per GPU first."""
    found: list[Change] = []
    for variant in _variants(cluster, winner.config, constraints):
        config = _best_near(model, variant, workload, winner.config, stack)
        if config is None:
            continue
        best, step_s = config
        tokens = best.global_batch / step_s
        before = winner.config.global_batch / winner.time.step_s
        total = tokens / before
        gain = total * winner.config.world_size / best.world_size
        found.append(
            Change(variant.name, variant.kind, gain, total, best, _sentence(variant, gain, total, winner, best))
        )
    return tuple(sorted(found, key=lambda c: -c.gain))


def _variants(cluster: Cluster, config: HybridParallelConfig, fixed: Constraints) -> Iterator[Variant]:
    batch = config.global_batch
    inter = replace(cluster.inter, bandwidth=cluster.inter.bandwidth * FACTOR)
    intra = replace(cluster.intra, bandwidth=cluster.intra.bandwidth * FACTOR)
    chip = cluster.accelerator
    if cluster.nodes > 1:
        yield Variant("a network twice as fast", "hardware", replace(cluster, inter=inter), batch, fixed)
    if cluster.gpus > 1:
        yield Variant("links inside the node twice as fast", "hardware", replace(cluster, intra=intra), batch, fixed)
    more = replace(chip, memory_bytes=chip.memory_bytes * FACTOR)
    yield Variant("twice the memory per GPU", "hardware", replace(cluster, accelerator=more), batch, fixed)
    yield Variant("twice the global batch", "job", cluster, batch * FACTOR, fixed)
    if cluster.gpus * FACTOR <= MAX_GPUS:
        yield Variant("twice the GPUs", "job", resize(cluster, gpus=cluster.gpus * FACTOR), batch, fixed)
    wide = config.precision in (Precision.BF16, Precision.FP16)
    if wide and chip.peak_flops.get("fp8", 0.0) > chip.peak_flops.get("bf16", 0.0):
        yield Variant("products in fp8", "precision", cluster, batch, replace(fixed, precision=Precision.FP8))


def _best_near(
    model: ModelSpec, variant: Variant, workload: Workload, config: HybridParallelConfig, stack: Stack
) -> tuple[HybridParallelConfig, float] | None:
    """The fastest plan of the variant near the winner, and its step time; None where none fits."""
    fixed = variant.constraints
    near = replace(
        fixed,
        tp=fixed.tp or _near(config.tp),
        pp=fixed.pp or _near(config.pp),
        cp=fixed.cp or tuple(c for c in context_sizes(workload.seq, variant.cluster.gpus) if c in _near(config.cp)),
        dp=None,
        schedule=fixed.schedule or (config.schedule,),
        expert_tp=fixed.expert_tp or (config.expert_tp,),
    )
    configurations = space(model, variant.cluster, workload.seq, variant.cluster.gpus, variant.global_batch, near)
    if len(configurations) == 0:
        return None
    survivors = explore(model, variant.cluster, workload, configurations, stack).survivors
    if len(survivors) == 0:
        return None
    row = int(ranked(survivors, Objective.THROUGHPUT)[0])
    return survivors.candidates.config(row), float(survivors.step_s[row])


def _near(size: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, size // FACTOR), size, size * FACTOR}))


def _sentence(variant: Variant, gain: float, total: float, winner: Estimate, best: HybridParallelConfig) -> str:
    axes = [n for n in ("tp", "pp", "cp", "ep") if getattr(best, n) != getattr(winner.config, n)]
    moved = [f"{n}={getattr(best, n)}" for n in axes]
    then = f", then with {' '.join(moved)}" if moved else ""
    if best.world_size != winner.config.world_size:
        return f"{variant.name}: {total:.2f}x the speed of the job, {gain:.0%} of it per GPU{then}"
    return f"{variant.name}: {gain - 1:+.1%} speed{then}"
