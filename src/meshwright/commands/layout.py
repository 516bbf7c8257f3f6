"""`meshwright layout`: the rank map, the groups of every axis, and what each axis communicates."""

from __future__ import annotations

from typing import Annotated

import typer

from meshwright.commands import options as o
from meshwright.commands import output
from meshwright.commands.inputs import config_of, load_cluster, load_model, needed
from meshwright.cost.estimate import Estimate
from meshwright.hardware import Cluster, segment
from meshwright.layout.config import HybridParallelConfig

NODES_OF_8 = "h100-sxm"
"""Whose nodes are drawn where no cluster is named."""

Order = Annotated[
    str, typer.Option("--order", help="default, vllm, megatron, or a Megatron order string like tp-cp-ep-dp-pp.")
]
OptionalModel = Annotated[
    str | None,
    typer.Option("--model", help="Fill in bytes and calls for this model.", rich_help_panel=o.WORKLOAD,
                 show_default=False),
]  # fmt: skip


def layout(
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

    config = config_of(
        HybridParallelConfig(), dp=dp, tp=tp, pp=pp, cp=cp, ep=ep, expert_tp=expert_tp, vpp=vpp,
        micro_batch=micro_batch, global_batch=global_batch, zero=zero, zero_shards=zero_shards,
        schedule=schedule, sequence_parallel=sp,
    )  # fmt: skip
    placed = rank_layout(config, order)
    machine = load_cluster(cluster or NODES_OF_8, gpus_per_node=gpus_per_node)
    domain = segment(machine, config.world_size)
    patterns = communication_patterns(placed, domain=domain)
    if model is not None:
        estimate = priced(config, model, needed("--seq", seq, 8192), machine)
        patterns = with_ledger(
            patterns, max(estimate.traffic.values(), key=lambda lines: sum(e.total_bytes for e in lines))
        )
    if as_json:
        output.show_json(layout_document(placed, patterns, machine.gpus_per_node, domain))
    else:
        output.show(layout_report(placed, patterns, machine.gpus_per_node, domain))


def priced(config: HybridParallelConfig, model: str, seq: int, cluster: Cluster) -> Estimate:
    """The estimate whose ledger fills in calls and bytes."""
    from meshwright.cost.evaluate import estimate
    from meshwright.cost.workload import Workload
    from meshwright.hardware import resize

    sized = resize(cluster, gpus=config.world_size)
    return estimate(load_model(model), sized, Workload(seq=seq), config)
