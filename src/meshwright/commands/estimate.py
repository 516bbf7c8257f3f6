"""`meshwright estimate`: one configuration in full - memory, time, traffic - of a model or of a plan file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from meshwright.commands import options as o
from meshwright.commands import output
from meshwright.commands.inputs import configured
from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig

if TYPE_CHECKING:
    from meshwright.commands.jobs import Job
    from meshwright.simulation import StepTimeline


def estimate(
    model: o.ModelOrPlan,
    cluster: o.ClusterName = None,
    nodes: o.Nodes = None,
    gpus: o.Gpus = None,
    gpus_per_node: o.GpusPerNode = None,
    reserved_gib: o.ReservedGib = None,
    seq: o.Seq = None,
    global_batch: o.GlobalBatch = None,
    dp: o.Dp = None,
    tp: o.Tp = None,
    pp: o.Pp = None,
    cp: o.Cp = None,
    ep: o.Ep = None,
    expert_tp: o.ExpertTp = None,
    vpp: o.Vpp = None,
    micro_batch: o.MicroBatch = None,
    recompute: o.Recomputation = None,
    recompute_every: o.RecomputeEvery = None,
    zero: o.Zero = None,
    zero_shards: o.ZeroShards = None,
    schedule: o.ScheduleName = None,
    sp: o.SequenceParallel = None,
    cp_variant: o.CpVariant = None,
    precision: o.PrecisionName = None,
    optimizer: o.OptimizerName = None,
    flash: o.Flash = None,
    dropout: o.Dropout = None,
    stack: o.StackName = None,
    out: o.PlanOut = None,
    trace: o.TraceOut = None,
    as_json: o.Json = False,
) -> int:
    """What one configuration needs and how fast it runs: memory by stage, where every second goes, all traffic.

    dp left out is as many replicas as the cluster holds. --trace replays the pipeline's schedule event by event. Exit
    code 1 says that it does not fit.
    """
    from meshwright.commands.jobs import ClusterOptions, WorkloadOptions, is_plan, job_of_model, job_of_plan, plan_of
    from meshwright.commands.serving import estimate_serving
    from meshwright.cost.evaluate import estimate as price
    from meshwright.plan import Plan, ServingWorkload
    from meshwright.plan.proved import verdict
    from meshwright.planner.legality import check
    from meshwright.report.estimate_tables import estimate_report
    from meshwright.report.headings import job_line
    from meshwright.report.json_documents import estimate_document
    from meshwright.report.layout_tables import axis_links
    from meshwright.report.timeline_plot import timeline_document, timeline_report

    machine = ClusterOptions(cluster, nodes, gpus, gpus_per_node, reserved_gib)
    work = WorkloadOptions(seq, optimizer, flash, dropout, stack)
    given = {
        "dp": dp, "tp": tp, "pp": pp, "cp": cp, "ep": ep, "expert_tp": expert_tp, "vpp": vpp,
        "micro_batch": micro_batch, "global_batch": global_batch, "recompute": recompute,
        "recompute_every": recompute_every, "zero": zero, "zero_shards": zero_shards, "schedule": schedule,
        "sequence_parallel": sp, "cp_variant": cp_variant, "precision": precision,
    }  # fmt: skip
    plan = Plan.read(model) if is_plan(model) else None
    if plan is not None:
        if isinstance(plan.workload, ServingWorkload):
            if trace is not None:
                raise InputError("--trace shows a training step; this plan serves")
            return estimate_serving(plan, plan.workload, as_json)
        job, base = job_of_plan(plan, machine, work), plan.parallel
        if not machine.resizes and not any((dp, tp, pp, cp)):
            given["dp"] = base.dp
    else:
        world = None if dp is None else dp * (tp or 1) * (pp or 1) * (cp or 1)
        job, base = job_of_model(model, machine, work, world), HybridParallelConfig()
    config = configured(base, job.cluster.gpus, given)
    check(config, job.model, job.cluster, job.workload.seq)
    result = price(job.model, job.cluster, job.workload, config, job.stack)
    if out is not None:
        plan_of(job, config, result).write(out)
    note = verdict(Path(model), plan) if plan is not None and config == plan.parallel else None
    timeline = _traced(job, config, trace) if trace is not None else None
    if as_json:
        simulated = {} if timeline is None else {"simulation": timeline_document(timeline)}
        proved = {} if note is None else {"proof": note}
        output.show_json({**estimate_document(result), **simulated, **proved})
    else:
        heading = job_line(job.model, job.cluster, job.workload.seq, config.global_batch)
        output.show(estimate_report(result, heading, axis_links(config, job.cluster)))
        if timeline is not None:
            output.show(timeline_report(timeline))
        if note is not None:
            output.show(note)
    return 0 if result.memory.fits else 1


def _traced(job: Job, config: HybridParallelConfig, path: Path) -> StepTimeline:
    """Simulate the step and write its trace."""
    from meshwright.simulation import simulate_step, write_trace

    timeline = simulate_step(job.model, job.cluster, job.workload, config, job.stack)
    write_trace(timeline, path)
    return timeline
