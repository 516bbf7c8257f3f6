"""`meshwright layout`: the rank map, the groups of every axis, and what each axis communicates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from meshwright.commands import options as o
from meshwright.commands import output
from meshwright.commands.inputs import config_of, load_cluster, load_model, needed
from meshwright.cost.workload import Workload
from meshwright.hardware import Cluster, segment
from meshwright.layout.config import HybridParallelConfig
from meshwright.ledger import TrafficEntry
from meshwright.models import ModelSpec

NODES_OF_8 = "h100-sxm"
"""Whose nodes are drawn where no cluster is named."""

Order = Annotated[
    str, typer.Option("--order", help="default, vllm, megatron, or a Megatron order string like tp-cp-ep-dp-pp.")
]
OptionalPlan = Annotated[
    str | None, typer.Argument(metavar="[PLAN]", help="A plan file; sizes given as options replace its own.")
]
OptionalModel = Annotated[
    str | None,
    typer.Option("--model", help="Fill in bytes and calls for this model.", rich_help_panel=o.WORKLOAD,
                 show_default=False),
]  # fmt: skip


def layout(
    plan: OptionalPlan = None,
    dp: o.Dp = None,
    tp: o.Tp = None,
    pp: o.Pp = None,
    cp: o.Cp = None,
    ep: o.Ep = None,
    expert_tp: o.ExpertTp = None,
    vpp: o.Vpp = None,
    micro_batch: o.MicroBatch = None,
    global_batch: o.GlobalBatch = None,
    zero: o.Zero = None,
    zero_shards: o.ZeroShards = None,
    schedule: o.ScheduleName = None,
    sp: o.SequenceParallel = None,
    cp_variant: o.CpVariant = None,
    order: Order = "default",
    model: OptionalModel = None,
    seq: o.Seq = None,
    cluster: o.ClusterName = None,
    gpus_per_node: o.GpusPerNode = None,
    as_json: o.Json = False,
) -> None:
    """Draw where every rank sits, list the groups of every axis, and say what each axis communicates."""
    from meshwright.layout.communication import communication_patterns, with_ledger
    from meshwright.layout.grid import rank_layout
    from meshwright.report.layout_tables import layout_document, layout_report

    given = {
        "dp": dp, "tp": tp, "pp": pp, "cp": cp, "ep": ep, "expert_tp": expert_tp, "vpp": vpp,
        "micro_batch": micro_batch, "global_batch": global_batch, "zero": zero, "zero_shards": zero_shards,
        "schedule": schedule, "sequence_parallel": sp, "cp_variant": cp_variant,
    }  # fmt: skip
    if plan is None:
        config = config_of(HybridParallelConfig(), **given)
        machine = load_cluster(cluster or NODES_OF_8, gpus_per_node=gpus_per_node)
        ledger = None if model is None else ledger_of(config, model, needed("--seq", seq, 8192), machine)
    else:
        config, machine, ledger = planned(plan, cluster, gpus_per_node, seq, given)
    placed = rank_layout(config, order)
    reach = segment(machine)
    patterns = communication_patterns(placed, domain=reach)
    patterns = patterns if ledger is None else with_ledger(patterns, ledger)
    if as_json:
        output.show_json(layout_document(placed, patterns, machine.gpus_per_node, reach))
    else:
        output.show(layout_report(placed, patterns, machine.gpus_per_node, reach))


def ledger_of(config: HybridParallelConfig, model: str, seq: int, cluster: Cluster) -> tuple[TrafficEntry, ...]:
    """What a rank of the busiest stage sends and receives, for the calls and bytes of every axis."""
    from meshwright.hardware import resize

    return busiest(load_model(model), resize(cluster, gpus=config.world_size), Workload(seq=seq), config)


def planned(
    path: str, cluster: str | None, gpus_per_node: int | None, seq: int | None, given: Mapping[str, object]
) -> tuple[HybridParallelConfig, Cluster, tuple[TrafficEntry, ...]]:
    """Configuration, machine and ledger of a plan file with the options given laid over it."""
    from meshwright.commands.jobs import ClusterOptions, WorkloadOptions, job_of_plan
    from meshwright.plan import Plan

    read = Plan.read(path)
    config = config_of(read.parallel, **given)
    world = None if config.world_size == read.parallel.world_size and cluster is None else config.world_size
    job = job_of_plan(read, ClusterOptions(cluster, gpus=world, gpus_per_node=gpus_per_node), WorkloadOptions(seq))
    return config, job.cluster, busiest(job.model, job.cluster, job.workload, config)


def busiest(
    model: ModelSpec, cluster: Cluster, workload: Workload, config: HybridParallelConfig
) -> tuple[TrafficEntry, ...]:
    """The ledger of the stage that moves most."""
    from meshwright.cost.evaluate import estimate
    from meshwright.planner.legality import check

    check(config, model, cluster, workload.seq)
    traffic = estimate(model, cluster, workload, config).traffic
    return max(traffic.values(), key=lambda lines: sum(entry.total_bytes for entry in lines))
