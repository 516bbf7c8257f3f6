"""`meshwright plan --serve --disaggregated`: a pool of GPUs that reads prompts and one that writes answers.

In: what the command parsed. Out: an exit code, after one call and one print; with -o a plan file for each pool.
"""

from __future__ import annotations

from pathlib import Path

from meshwright.commands import output
from meshwright.commands.jobs import section_of
from meshwright.commands.serving import ServingJob, ServingQuestion
from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig
from meshwright.plan import EstimateSummary, Plan
from meshwright.planner.disaggregated import DisaggregatedPlan, disaggregated_search
from meshwright.planner.objectives import Objective
from meshwright.report.disaggregated_tables import disaggregated_document, disaggregated_report
from meshwright.serving.pools import connector_for

BY_LAYER = {"at-end": False, "by-layer": True}


def plan_pools(question: ServingQuestion, transfer: str | None, out: Path | None, plot: bool, as_json: bool) -> int:
    """Search pairs of pools, print them beside the best single pool, write the best pair."""
    if transfer is not None and transfer not in BY_LAYER:
        raise InputError(f"--kv-transfer {transfer!r}: use one of {', '.join(BY_LAYER)}")
    if question.objective is not Objective.THROUGHPUT:
        raise InputError("--disaggregated ranks pools by throughput: leave --objective out")
    if question.fixed.dp is not None:
        raise InputError("--dp is what --disaggregated finds for each pool: leave it out")
    if plot:
        raise InputError("--plot draws the front of one pool: leave it or --disaggregated out")
    job = ServingJob.of(question)
    by_layer = BY_LAYER[transfer or "at-end"]
    found = disaggregated_search(job.model, job.cluster, job.workload, question.top, job.fixed, job.stack, by_layer)
    if out is not None and found.best:
        for pool, plan in pool_plans(question, job, found.best[0]).items():
            plan.write(out.with_name(f"{out.stem}.{pool}{out.suffix or '.yaml'}"))
    if as_json:
        output.show_json(disaggregated_document(job.model, job.cluster, job.workload, found))
    else:
        output.show(disaggregated_report(job.heading, found))
    return 0 if found.best else 1


def pool_plans(question: ServingQuestion, job: ServingJob, best: DisaggregatedPlan) -> dict[str, Plan]:
    """A plan per pool, which `serve` and `export --to vllm` read."""
    connector = connector_for(best.prefill.config)
    summary = EstimateSummary(tokens_per_s_per_gpu=best.tokens_per_s_per_gpu)

    def plan(pool: str, config: HybridParallelConfig, batch: int) -> Plan:
        section = job.section.model_copy(update={"pool": pool, "kv_connector": connector, "batch": batch})
        cluster = section_of(question.cluster, job.cluster)
        objective = question.objective.value
        return Plan.from_parts(question.model, config, section, cluster, objective=objective, estimate=summary)

    return {
        "prefill": plan("prefill", best.prefill.config, best.prefill.prompts * best.prefill.config.pp),
        "decode": plan("decode", best.decode.config, best.decode.sequences),
    }
