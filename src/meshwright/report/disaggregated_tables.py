"""Two pools as a person reads them: the best pairs, what the first token waits for, and one pool beside.

In: the planner's `DisaggregatedResult`. Out: rich renderables and a JSON document.
"""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.cost.workload import ServingWorkload
from meshwright.hardware import Cluster
from meshwright.layout.config import HybridParallelConfig
from meshwright.models import ModelSpec
from meshwright.planner.disaggregated import DisaggregatedPlan, DisaggregatedResult
from meshwright.report.fitted_table import table
from meshwright.report.json_documents import config_document, plain
from meshwright.report.numbers import percent, seconds, size, whole
from meshwright.report.serving_tables import serving_estimate_document

Document = dict[str, Any]
LIMITS = {
    "prefill": "the prefill pool reads no more prompts",
    "decode": "the decode pool writes no more tokens",
    "link": "the link between the pools moves no more caches",
}


def disaggregated_report(heading: str, found: DisaggregatedResult) -> RenderableType:
    """The whole answer."""
    counts = found.counts
    searched = f"{whole(counts.enumerated)} pairs of pools priced in {seconds(counts.seconds)}"
    sentence = found.sentence[0].upper() + found.sentence[1:] + "."
    first: list[RenderableType] = [Text(heading, style="bold"), Text(searched), Text()]
    if not found.best:
        return Group(*first, Text(sentence, style="bold red"))
    best = found.best[0]
    parts: list[RenderableType] = [
        *first,
        pairs_table(found.best),
        Text(),
        Text(transfer_line(best)),
        Text(first_token_line(best)),
        Text(f"The rate is bound by one thing: {LIMITS[best.limit]}." + _idle(best)),
        Text(),
        Text("Two pools or one", style="bold"),
        Text(f"  {sentence}"),
    ]
    if found.aggregated is not None:
        one = found.aggregated
        parts.append(Text(
            f"  one pool: {split_words(one.config)}, {whole(one.tokens_per_s_per_gpu)} tokens/s per GPU, first token "
            f"after {seconds(one.ttft_s)} where none waits, {seconds(one.tpot_s)} per token"
        ))  # fmt: skip
    return Group(*parts)


def pairs_table(plans: tuple[DisaggregatedPlan, ...]) -> Table:
    """One line per pair."""
    made = table("Best pairs of pools by throughput", "#", "prefill", "GPUs", "prompts at once", "busy", "decode",
                 "GPUs", "sequences", "first token", "per token", "tok/s/GPU",
                 text=("prefill", "decode"), expendable=("busy", "prompts at once"))  # fmt: skip
    for number, plan in enumerate(plans, start=1):
        reads, writes = plan.prefill, plan.decode
        made.add_row(
            str(number),
            split_words(reads.config),
            str(reads.config.world_size),
            str(reads.prompts),
            percent(reads.busy),
            split_words(writes.config),
            str(writes.config.world_size),
            whole(writes.sequences),
            seconds(plan.ttft_s),
            seconds(plan.tpot_s),
            whole(plan.tokens_per_s_per_gpu),
            style="bold" if number == 1 else "",
        )
    return made


def split_words(config: HybridParallelConfig) -> str:
    """'dp2 tp4', sizes of one left out but dp."""
    named = ((name, getattr(config, name)) for name in ("pp", "tp", "ep"))
    return " ".join((f"dp{config.dp}", *(f"{name}{value}" for name, value in named if value > 1)))


def transfer_line(plan: DisaggregatedPlan) -> str:
    moved = plan.transfer
    when = (
        f"layer by layer while the next is computed, so that the first token waits for {seconds(moved.exposed_s)} of it"
        if moved.by_layer
        else "when the prompt has been read, and the first token waits for it"
    )
    return f"Plan 1 moves {size(moved.bytes_per_request)} of cache per prompt in {seconds(moved.transfer_s)}, {when}."


def first_token_line(plan: DisaggregatedPlan) -> str:
    reads = plan.prefill
    return (
        f"Its first token: {seconds(reads.wait_s)} of waiting + {seconds(reads.reading_s)} of reading + "
        f"{seconds(plan.transfer.exposed_s)} of transfer + {seconds(plan.tpot_s)} of the decode pool's first step."
    )


def _idle(plan: DisaggregatedPlan) -> str:
    return f" {plan.idle_gpus} GPUs are left over." if plan.idle_gpus else ""


def disaggregated_document(
    model: ModelSpec, cluster: Cluster, workload: ServingWorkload, found: DisaggregatedResult
) -> Document:
    """`plans[]` best first; the best single pool; whether two pay."""
    return {
        "model": {"name": model.name, "parameters": model.parameters},
        "cluster": {"name": cluster.name, "accelerator": cluster.accelerator.name, "gpus": cluster.gpus},
        "workload": {"kind": "serving", **plain(workload)},
        "plans": [_plan_document(plan) for plan in found.best],
        "aggregated": None if found.aggregated is None else serving_estimate_document(found.aggregated, cluster),
        "gain_over_aggregated": plain(found.gain),
        "reason": found.sentence,
        "search": {"evaluated": found.counts.evaluated, "feasible": found.counts.feasible,
                   "seconds": found.counts.seconds},
    }  # fmt: skip


def _plan_document(plan: DisaggregatedPlan) -> Document:
    values: Document = plain(plan)
    for pool, config in (("prefill", plan.prefill.config), ("decode", plan.decode.config)):
        values[pool]["config"] = config_document(config)
    return values
