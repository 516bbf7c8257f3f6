"""The layout of a training plan chosen anew for the ranks that are left: what `meshwright train --replan` runs.

In: the plan and how many ranks torchrun started. Out: the plan of that world with the same model, workload, global
batch, precision and training options, and a line that says what was chosen. Every rank chooses for itself: the search
is the same on all of them, and the start compares the plans.
"""

from __future__ import annotations

from meshwright.doctor.oom import question_of
from meshwright.errors import InputError
from meshwright.hardware import Cluster
from meshwright.hardware import load as load_cluster
from meshwright.layout.config import HybridParallelConfig, Recompute, Schedule
from meshwright.models.spec import ModelSpec, MoeMlp
from meshwright.plan import Plan
from meshwright.planner.constraints import Constraints
from meshwright.planner.search import search


def replanned(plan: Plan, ranks: int) -> tuple[Plan, str]:
    """The best plan for `ranks` ranks, and the line for people. An InputError where none is legal or none fits."""
    resized = plan if plan.cluster is None else _resized(plan, ranks)
    cluster = _cluster(resized, ranks)
    asked = question_of(resized, cluster, ours=True)
    old = plan.parallel
    found = search(
        asked.model,
        cluster,
        asked.workload,
        old.global_batch,
        top=1,
        constraints=runnable(asked.model, old),
        stack=asked.stack,
    )
    if not found.best:
        raise InputError(f"--replan: no layout of {ranks} ranks leaves the model room in memory; start more ranks")
    new = found.best[0].config
    line = f"the plan has {old.world_size} ranks, {ranks} were started: {layout_words(new)} in place of "
    return resized.model_copy(update={"parallel": new, "provenance": None}), line + layout_words(old)


def runnable(model: ModelSpec, old: HybridParallelConfig) -> Constraints:
    """What the search may choose from, so that the runtime surely runs it and the training stays the same.

    Context parallel and selective recompute depend on the model's attention and dropout: only where the plan had them.
    Of schedules only GPipe is left out: 1F1B does the same with fewer microbatches held. A model with experts balances
    over a microbatch: it keeps its size, and gets stages only where it had them.
    """
    experts = any(isinstance(kind.mlp, MoeMlp) for kind in model.kinds)
    return Constraints(
        cp=None if old.cp > 1 else (1,),
        pp=(1,) if experts and old.pp == 1 else None,
        micro_batch=(old.micro_batch,) if experts else None,
        recompute=tuple(r for r in Recompute if r is not Recompute.SELECTIVE or r is old.recompute),
        runs=tuple(s for s in Schedule if s is not Schedule.GPIPE),
        precision=old.precision,
    )


def _resized(plan: Plan, ranks: int) -> Plan:
    assert plan.cluster is not None
    return plan.model_copy(update={"cluster": plan.cluster.model_copy(update={"nodes": None, "gpus": ranks})})


def _cluster(plan: Plan, ranks: int) -> Cluster:
    """The plan's cluster, or this kind of machine where it names none: one node of as many cores."""
    return load_cluster("cpu", nodes=1, gpus_per_node=ranks) if plan.cluster is None else plan.load_cluster()


def layout_words(config: HybridParallelConfig) -> str:
    """'dp 2 x tp 2, ZeRO-1, micro batch 4'; of a pipeline the schedule too, where it is another than 1F1B."""
    axes = " x ".join(f"{a} {n}" for a in ("dp", "pp", "cp", "tp", "ep") if (n := getattr(config, a)) > 1) or "one rank"
    zero = f", ZeRO-{config.zero}" if config.zero else ""
    recompute = "" if config.recompute is Recompute.NONE else f", recompute {config.recompute.value}"
    schedule = "" if config.pp == 1 or config.schedule is Schedule.ONE_F_ONE_B else f", {config.schedule.value}"
    return f"{axes}{schedule}{zero}{recompute}, micro batch {config.micro_batch}"
