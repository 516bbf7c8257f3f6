"""The search: evaluate every configuration of a space, keep those that fit, rank them by objective.

In: model, cluster, workload, global batch. Out: `SearchResult` - the best plans in full, the Pareto front of memory
against speed, the rule-of-thumb plan beside them, and how much was searched. Works chunk by chunk in bounded memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter

from meshwright.cost.estimate import Estimate
from meshwright.cost.evaluate import estimates
from meshwright.cost.stack import Stack, default_stack
from meshwright.cost.workload import Workload
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import HybridParallelConfig
from meshwright.models.spec import ModelSpec
from meshwright.planner.constraints import Constraints
from meshwright.planner.enumerate import space
from meshwright.planner.explore import HEADROOM, Exploration, Progress, SearchCounts, explore
from meshwright.planner.front import Survivors, fronts
from meshwright.planner.nothing_legal import nothing_legal
from meshwright.planner.objectives import Objective, best_of_each_mesh, ranked
from meshwright.planner.rule_of_thumb import rule_of_thumb
from meshwright.planner.sizing import Smallest, fewest_gpus

BRIM = "no plan leaves {:.0%} of the memory free: these may run out of it, for the memory model errs by about as much"


@dataclass(frozen=True)
class FrontPoint:
    """One configuration of the Pareto front: no other is both faster and smaller."""

    config: HybridParallelConfig
    memory_bytes: int
    step_s: float
    tokens_per_s_per_gpu: float


@dataclass(frozen=True)
class SearchResult:
    """What a search found. `best` is empty where nothing fits. `gain` is the speed of the best plan over the rule of
    thumb's (1.10: ten percent faster), None where the rule of thumb finds no plan that fits. `fewest` is the plan on
    the fewest GPUs that fits, looked for where the objective is memory."""

    objective: Objective
    gpus: int
    global_batch: int
    best: tuple[Estimate, ...]
    pareto: tuple[FrontPoint, ...]
    rule_of_thumb: Estimate | None
    gain: float | None
    counts: SearchCounts
    fewest: Smallest | None = None
    notes: tuple[str, ...] = ()


def search(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    global_batch: int,
    objective: Objective = Objective.THROUGHPUT,
    top: int = 10,
    constraints: Constraints | None = None,
    stack: Stack | None = None,
    progress: Progress | None = None,
    headroom: float = HEADROOM,
) -> SearchResult:
    """The best `top` plans (one per mesh) for all GPUs of the cluster and `global_batch` sequences a step. Plans leave
    the share `headroom` of the memory free, unless none can."""
    start = perf_counter()
    fixed = constraints or Constraints()
    software = stack or default_stack()
    configurations = space(model, cluster, workload.seq, cluster.gpus, global_batch, fixed)
    if len(configurations) == 0:
        raise nothing_legal(model, cluster, workload.seq, global_batch, fixed)
    found = explore(model, cluster, workload, configurations, software, progress, headroom=headroom)
    survivors = found.survivors
    order = ranked(survivors, objective)
    rows = best_of_each_mesh(survivors, order, top)
    configs = [survivors.candidates.config(int(row)) for row in rows]
    textbook = rule_of_thumb(model, cluster, workload, global_batch, fixed.precision, software, headroom)
    in_full = estimates(model, cluster, workload, [*configs, *([textbook] if textbook else [])], software)
    best, thumb = in_full[: len(configs)], in_full[len(configs)] if textbook else None
    fewest = None
    if objective is Objective.MEMORY:
        fewest = fewest_gpus(model, cluster, workload, global_batch, fixed, software)
    gain = thumb.time.step_s / best[0].time.step_s if best and thumb else None
    return SearchResult(
        objective=objective,
        gpus=cluster.gpus,
        global_batch=global_batch,
        best=best,
        pareto=pareto(survivors, workload.seq),
        rule_of_thumb=thumb,
        gain=gain,
        counts=replace(found.counts, seconds=perf_counter() - start),
        fewest=fewest,
        notes=configurations.notes + _notes(found, fewest, headroom),
    )


def _notes(found: Exploration, fewest: Smallest | None, headroom: float) -> tuple[str, ...]:
    notes: list[str] = []
    if found.tight and len(found.survivors):
        notes.append(BRIM.format(headroom))
    if fewest is not None:
        c = fewest.config
        axes = f"tp={c.tp} pp={c.pp} cp={c.cp} dp={c.dp} ep={c.ep}, ZeRO-{c.zero}, recompute {c.recompute.value}"
        share = fewest.memory_bytes / fewest.capacity_bytes
        notes.append(f"the fewest GPUs on which this job fits are {c.world_size} ({axes}: memory {share:.0%} full)")
    return tuple(notes)


def pareto(survivors: Survivors, seq: int) -> tuple[FrontPoint, ...]:
    """The Pareto front of memory against speed over all meshes, fastest first."""
    front = fronts(survivors)
    points: list[FrontPoint] = []
    for row in range(len(front)):
        config = front.candidates.config(row)
        step_s = float(front.step_s[row])
        tokens = config.global_batch * seq / step_s / config.world_size
        points.append(FrontPoint(config, int(front.memory_bytes[row]), step_s, tokens))
    return tuple(points)
