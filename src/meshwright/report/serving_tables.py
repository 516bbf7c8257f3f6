"""Serving as a person reads it: the best ways to serve with their reasons, speed per user against speed per GPU.

In: the planner's `ServingResult` or one `ServingEstimate`. Out: rich renderables and JSON documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.cost.serving import ServingEstimate
from meshwright.cost.vllm_cache import MEMORY_SHARE, VllmCache
from meshwright.cost.workload import ServingWorkload
from meshwright.hardware import Cluster
from meshwright.models import ModelSpec
from meshwright.planner.serving import ServingPoint, ServingResult
from meshwright.report.fitted_table import table
from meshwright.report.json_documents import config_document, plain
from meshwright.report.numbers import gib, percent, seconds, whole
from meshwright.report.plan_tables import reasons_list, spread
from meshwright.report.plots import Series, plot

Document = dict[str, Any]
MOST_POINTS = 8


def serving_report(
    heading: str, found: ServingResult, cache: VllmCache | None = None, with_plot: bool = False
) -> RenderableType:
    """The whole answer of a serving search."""
    counts = found.counts
    searched = f"{whole(counts.enumerated)} splits, {whole(counts.evaluated)} priced in {seconds(counts.seconds)}"
    first: list[RenderableType] = [Text(heading, style="bold"), Text(searched)]
    if not found.best:
        missing = found.shortfall
        sentence = missing.sentence if missing else "nothing fits"
        return Group(*first, Text(sentence[0].upper() + sentence[1:] + ".", style="bold red"))
    parts: list[RenderableType] = [
        *first,
        Text(),
        ranked_table(found.best, f"Best ways to serve by {found.objective.value}"),
        Text(),
        Text("Why", style="bold"),
        reasons_list(found.reasons),
        Text(),
        Text("The textbook rule (smallest tp that fits inside a node, the rest replicas)", style="bold"),
        Text(_rule_line(found)),
        Text(),
        front_table(found.pareto),
    ]
    if cache is not None:
        parts[4:4] = [Text(cache_line(cache))]
    if with_plot:
        parts += [Text(), Text(front_plot(found.pareto))]
    return Group(*parts)


def cache_line(cache: VllmCache) -> str:
    """What vLLM will print of its KV cache under the best plan."""
    return (
        f"vLLM's KV cache under plan 1, on each replica: {whole(cache.blocks)} blocks = {whole(cache.tokens)} tokens, "
        f"{cache.requests:,.1f} requests of {whole(cache.longest)} tokens at once (gpu_memory_utilization "
        f"{MEMORY_SHARE})"
    )


def front_plot(points: Sequence[ServingPoint]) -> str:
    """The front as a picture: right is faster for the user, up is more per GPU."""
    user = [p.tokens_per_s_per_user for p in points]
    front = Series("best splits", user, [p.tokens_per_s_per_gpu for p in points])
    return plot([front], x_label="tokens/s per user", y_label="tokens/s per GPU", log_x=True, y_from=0.0)


def ranked_table(plans: Sequence[ServingEstimate], title: str) -> Table:
    """One line per split: GPUs of a replica, sequences in flight on each, latencies and rates."""
    experts = any(plan.config.ep > 1 for plan in plans)
    made = table(title, "#", "dp", "pp", "tp", *(("ep",) if experts else ()), "weights GiB", "sequences", "of at most",
                 "first token", "per token", "tok/s/GPU", "tokens/s",
                 expendable=("tokens/s", "of at most"))  # fmt: skip
    for number, plan in enumerate(plans, start=1):
        config = plan.config
        made.add_row(
            str(number),
            *(str(size) for size in (config.dp, config.pp, config.tp, *((config.ep,) if experts else ()))),
            gib(plan.weights_bytes),
            whole(plan.sequences),
            whole(plan.max_sequences),
            seconds(plan.ttft_s),
            seconds(plan.tpot_s),
            whole(plan.tokens_per_s_per_gpu),
            whole(plan.tokens_per_s),
            style="bold" if number == 1 else "",
        )
    return made


def _rule_line(found: ServingResult) -> str:
    thumb = found.rule_of_thumb
    if thumb is None or found.gain is None:
        return "  finds no split that fits."
    config = thumb.config
    split = f"  dp{config.dp} pp{config.pp} tp{config.tp}" + (f" ep{config.ep}" if config.ep > 1 else "")
    reached = f"{whole(thumb.tokens_per_s_per_gpu)} tokens/s per GPU, {seconds(thumb.tpot_s)} per token"
    if not thumb.meets_targets:  # then it is priced with one sequence: a ratio of rates would say nothing
        late = f"first token after {seconds(thumb.ttft_s)}, {seconds(thumb.tpot_s)} per token"
        return f"{split} misses the targets with even one sequence per replica ({late})."
    gain = f"{percent(found.gain - 1)} better" if found.gain >= 1 else f"{percent(1 - found.gain)} worse"
    if found.gain >= 2:
        gain = f"{found.gain:.1f} times as good"
    return f"{split}: {reached}; the best above is {gain}."


def front_table(points: Sequence[ServingPoint]) -> Table:
    """Speed per user against speed per GPU, the fastest user first."""
    made = table("Speed for one user against speed per GPU: nothing is better in both", "dp", "pp", "tp", "ep",
                 "sequences", "tok/s/user", "tok/s/GPU", "first token")  # fmt: skip
    for point in spread(points, MOST_POINTS):
        config = point.config
        made.add_row(*(str(size) for size in (config.dp, config.pp, config.tp, config.ep)), whole(point.sequences),
                     f"{point.tokens_per_s_per_user:,.1f}", whole(point.tokens_per_s_per_gpu),
                     seconds(point.ttft_s))  # fmt: skip
    return made


def serving_estimate_report(heading: str, one: ServingEstimate, cluster: Cluster) -> RenderableType:
    """One split in full."""
    config = one.config
    fit = (
        Text(f"Fits {whole(one.max_sequences)} sequences on each of {config.dp} replicas.", style="green")
        if one.fits
        else Text("Does not fit.", style="bold red")
    )
    made = table("Memory of the fullest GPU, GiB", "kind", "GiB")
    made.add_row("weights", gib(one.weights_bytes))
    made.add_row("workspace", gib(one.workspace_bytes))
    made.add_row(f"KV cache of {whole(one.sequences)} sequences", gib(one.cache_bytes_per_sequence * one.sequences))
    made.add_row("of the device", gib(cluster.accelerator.memory_bytes))
    speed = (
        f"First token after {seconds(one.ttft_s)}, {seconds(one.tpot_s)} per token; {whole(one.tokens_per_s)} "
        f"tokens/s, {whole(one.tokens_per_s_per_gpu)} per GPU; a static batch of {whole(one.sequences)} takes "
        f"{seconds(one.latency_s)}."
    )
    sizes = f"dp {config.dp} x pp {config.pp} x tp {config.tp}" + (f", ep {config.ep}" if config.ep > 1 else "")
    return Group(Text(heading, style="bold"), Text(sizes), fit, Text(speed), Text(), made)


def serving_document(model: ModelSpec, cluster: Cluster, workload: ServingWorkload, found: ServingResult) -> Document:
    """`plans[]` best first, with the reasons; what was searched; the front."""
    thumb, missing = found.rule_of_thumb, found.shortfall
    counts = found.counts
    return {
        "model": {"name": model.name, "parameters": model.parameters},
        "cluster": {"name": cluster.name, "accelerator": cluster.accelerator.name, "gpus": cluster.gpus},
        "workload": {"kind": "serving", **plain(workload)},
        "objective": found.objective.value,
        "plans": [
            {**serving_estimate_document(plan, cluster), "reason": reason}
            for plan, reason in zip(found.best, found.reasons, strict=True)
        ],
        "search": {"evaluated": counts.evaluated, "feasible": counts.feasible, "seconds": counts.seconds,
                   "enumerated": counts.enumerated},
        "rule_of_thumb": None if thumb is None else serving_estimate_document(thumb, cluster),
        "gain_over_rule_of_thumb": plain(found.gain),
        "nothing_fits": None if missing is None else {"sentence": missing.sentence, "fewest_gpus": missing.fewest_gpus},
        "pareto": [{**plain(point), "config": config_document(point.config)} for point in found.pareto],
    }  # fmt: skip


def serving_estimate_document(one: ServingEstimate, cluster: Cluster) -> Document:
    """One split: config, memory, time, throughput."""
    return {
        "config": config_document(one.config),
        "memory": {
            "fits": one.fits,
            "capacity_bytes": cluster.accelerator.memory_bytes,
            "weights_bytes": plain(one.weights_bytes),
            "workspace_bytes": plain(one.workspace_bytes),
            "cache_bytes_per_sequence": plain(one.cache_bytes_per_sequence),
            "max_sequences": one.max_sequences,
        },
        "sequences": one.sequences,
        "time": {"ttft_s": plain(one.ttft_s), "tpot_s": plain(one.tpot_s), "latency_s": plain(one.latency_s)},
        "throughput": {
            "tokens_per_s": plain(one.tokens_per_s),
            "tokens_per_s_per_gpu": plain(one.tokens_per_s_per_gpu),
        },
        "meets_targets": one.meets_targets,
    }
