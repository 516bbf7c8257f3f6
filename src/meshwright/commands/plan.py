"""`meshwright plan`: the best split for a model on a cluster, with the reasons."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from meshwright.commands import options as o
from meshwright.commands import output
from meshwright.commands.inputs import needed, sizes
from meshwright.commands.progress import search_progress
from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig, Schedule
from meshwright.planner.objectives import Objective

if TYPE_CHECKING:
    from meshwright.commands.jobs import Job
    from meshwright.cost.stack import Stack
    from meshwright.planner.constraints import Constraints


def plan(
    model: o.Model,
    cluster: o.ClusterName = None,
    nodes: o.Nodes = None,
    gpus: o.Gpus = None,
    gpus_per_node: o.GpusPerNode = None,
    reserved_gib: o.ReservedGib = None,
    seq: o.Seq = None,
    global_batch: o.GlobalBatch = None,
    objective: o.ObjectiveName = Objective.THROUGHPUT,
    top: o.Top = 10,
    dp: o.Dps = None,
    tp: o.Tps = None,
    pp: o.Pps = None,
    cp: o.Cps = None,
    ep: o.Eps = None,
    expert_tp: o.ExpertTps = None,
    vpp: o.Vpps = None,
    micro_batch: o.MicroBatches = None,
    zero: o.Zeros = None,
    recompute: o.Recomputation = None,
    schedule: o.ScheduleName = None,
    sp: o.SequenceParallel = None,
    precision: o.PrecisionName = None,
    optimizer: o.OptimizerName = None,
    flash: o.Flash = None,
    dropout: o.Dropout = None,
    stack: o.StackName = None,
    serve: o.Serve = False,
    disaggregated: o.Disaggregated = False,
    kv_transfer: o.KvTransfer = None,
    prompt: o.Prompt = None,
    output_tokens: o.Output = None,
    ttft_ms: o.TtftMs = None,
    tpot_ms: o.TpotMs = None,
    kv_format: o.KvFormat = None,
    weight_format: o.WeightFormat = None,
    prefix_hit_rate: o.PrefixHits = None,
    pass_tokens: o.PassTokens = None,
    out: o.PlanOut = None,
    plot: o.Plot = False,
    as_json: o.Json = False,
) -> int:
    """Search every legal split and show the best, why they win or lose, and what would help.

    A training step of --global-batch sequences of --seq tokens, or with --serve requests of --prompt and --output.
    Axes and knobs that are given restrict the search (several values like --tp 4,8). Exit code 1: nothing fits.
    """
    from meshwright.commands.disaggregated import plan_pools
    from meshwright.commands.jobs import ClusterOptions, WorkloadOptions, job_of_model
    from meshwright.commands.serving import Requests, ServingQuestion, plan_serving, refuse_training_options
    from meshwright.planner.constraints import Constraints

    machine = ClusterOptions(cluster, nodes, gpus, gpus_per_node, reserved_gib)
    named = {"dp": dp, "tp": tp, "pp": pp, "cp": cp, "ep": ep, "vpp": vpp, "zero": zero}
    allowed = {name: sizes(f"--{name}", text) for name, text in named.items()}
    fixed = Constraints(
        **allowed,
        expert_tp=sizes("--expert-tp", expert_tp),
        micro_batch=sizes("--micro-batch", micro_batch),
        recompute=None if recompute is None else (recompute,),
        schedule=None if schedule is None else (schedule,),
        sequence_parallel=None if sp is None else (sp,),
        precision=precision or HybridParallelConfig().precision,
        runs=None,
    )
    requests = Requests(prompt, output_tokens, ttft_ms, tpot_ms, kv_format, weight_format, prefix_hit_rate, pass_tokens)
    if serve:
        refuse_training_options({
            "--seq": seq, "--global-batch": global_batch, "--cp": cp, "--vpp": vpp, "--micro-batch": micro_batch,
            "--zero": zero, "--recompute": recompute, "--schedule": schedule, "--sp": sp, "--optimizer": optimizer,
            "--flash": flash, "--dropout": dropout,
        })  # fmt: skip
        question = ServingQuestion(model, machine, requests, fixed, precision, objective, top, stack)
        if disaggregated:
            return plan_pools(question, kv_transfer, out, plot, as_json)
        if kv_transfer is not None:
            raise InputError("--kv-transfer is about two pools: give --disaggregated too")
        return plan_serving(question, out, plot, as_json)
    if disaggregated or kv_transfer is not None:
        raise InputError(
            f"{'--disaggregated' if disaggregated else '--kv-transfer'} is about serving: give --serve too"
        )
    requests.refuse_without_serve()
    if objective is Objective.LATENCY:
        raise InputError("--objective latency is about serving: give --serve, or --objective throughput or memory")
    job = job_of_model(model, machine, WorkloadOptions(seq, optimizer, flash, dropout, stack))
    if job.stack.schedules:
        fixed = replace(fixed, runs=tuple(Schedule(name) for name in job.stack.schedules))
    batch = needed("--global-batch", global_batch, 512)
    return train(Question(job, batch, fixed, objective, top), out=out, plot=plot, as_json=as_json)


def _schedule_notes(stack: Stack, fixed: Constraints) -> Iterator[str]:
    """Which pipeline schedules were searched, where the software has not all of them."""
    if not fixed.runs:
        return
    lacking = [schedule.value for schedule in fixed.schedule or () if schedule not in fixed.runs]
    if lacking:
        yield f"{stack.name} has no {' or '.join(lacking)}: its costs are those of {stack.name} all the same"
    elif fixed.schedule is None:
        names = ", ".join(schedule.value for schedule in fixed.runs)
        yield f"pipeline schedules are those of {stack.name} ({names}); --stack meshwright has every one"


@dataclass(frozen=True)
class Question:
    """What a search is asked."""

    job: Job
    global_batch: int
    fixed: Constraints
    objective: Objective
    top: int


def train(question: Question, *, out: Path | None, plot: bool, as_json: bool) -> int:
    """Search, print, and write the best plan of a training job."""
    from meshwright.commands.jobs import plan_of
    from meshwright.plan.proved import verdict
    from meshwright.planner.explained import explained
    from meshwright.planner.search import search
    from meshwright.planner.shortfall import shortfall
    from meshwright.report.headings import job_line
    from meshwright.report.plan_documents import nothing_fits_document, search_document
    from meshwright.report.plan_tables import nothing_fits_report, search_report

    job, fixed, batch = question.job, question.fixed, question.global_batch
    parts = (job.model, job.cluster, job.workload)
    with search_progress("searching") as progress:
        found = search(*parts, batch, question.objective, question.top, fixed, job.stack, progress)
    found = replace(found, notes=(*found.notes, *_schedule_notes(job.stack, fixed)))
    heading = job_line(job.model, job.cluster, job.workload.seq, batch)
    if not found.best:
        missing = shortfall(*parts, batch, fixed, job.stack)
        if as_json:
            output.show_json(nothing_fits_document(*parts, found, missing))
        else:
            output.show(nothing_fits_report(heading, found, missing))
        return 1
    why = explained(found, *parts, fixed, job.stack)
    note: str | None = None
    if out is not None:
        best = plan_of(job, found.best[0].config, found.best[0], question.objective.value)
        best.write(out)
        note = verdict(out, best)  # a dry run of this very plan may have left its proof there
    if as_json:
        proved = {} if note is None else {"proof": note}
        output.show_json({**search_document(*parts, found, why), **proved})
    else:
        output.show(search_report(heading, found, why, plot))
        if note is not None:
            output.show(note)
    return 0
