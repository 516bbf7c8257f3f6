"""A search as a person reads it: the ranked plans with the reason of each, what bounds the winner, what would help.

In: the results of the planner. Out: rich renderables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.cost.estimate import Estimate
from meshwright.layout.config import ContextVariant, HybridParallelConfig, Recompute
from meshwright.planner.changes import Change
from meshwright.planner.explained import Explanation
from meshwright.planner.search import FrontPoint, SearchResult
from meshwright.planner.shortfall import Shortfall
from meshwright.report.estimate_tables import confidence_lines
from meshwright.report.fitted_table import Drawing, table
from meshwright.report.numbers import gib, percent, seconds, whole
from meshwright.report.plots import Series, plot

Point = TypeVar("Point")
MOST_CHANGES = 3
LEAST_GAIN = 0.001
MOST_PLOT, PLOT_MARGIN = 72, 8
SPLIT_COLUMNS = ("dp", "pp", "cp", "tp", "ep")
SCHEDULES = {"interleaved-1f1b": "1f1b-i"}
"""Shorter names where a column must stay narrow."""


def search_report(heading: str, found: SearchResult, why: Explanation, plot: bool = False) -> RenderableType:
    """The whole answer of a search that found plans."""
    sentences = [f"best: {why.bound.sentence}", *(reason.sentence for reason in why.reasons)]
    parts: list[RenderableType] = [
        Text(heading, style="bold"),
        Text(search_line(found)),
        Text(),
        ranked_table(found.best, f"Best plans by {found.objective.value} (one per mesh)"),
        Text(),
        *([confidence_lines(found.best[0])] if found.best else []),
        Text(),
        Text("Why", style="bold"),
        reasons_list(sentences),
        Text(),
        Text("The textbook rule (smallest tp that fits inside the fast domain, then pp, the rest dp)", style="bold"),
        Text(rule_of_thumb_line(found)),
        Text(),
        Text("What one change would bring", style="bold"),
        Text("\n".join(f"  {change.sentence}" for change in worth_telling(why.changes))),
        Text(),
        front_table(found.pareto),
        *([Drawing(lambda width: front_plot(found.pareto, min(MOST_PLOT, width - PLOT_MARGIN)))] if plot else []),
        *(Text(f"Note: {note}", style="dim") for note in found.notes),
    ]
    return Group(*parts)


def worth_telling(changes: Sequence[Change]) -> list[Change]:
    """The few that help most, and in any case what more GPUs would bring."""
    helpful = [change for change in changes if change.gain > 1 + LEAST_GAIN][:MOST_CHANGES]
    more = [change for change in changes if change.total_gain != change.gain and change not in helpful]
    return helpful + more


def nothing_fits_report(heading: str, found: SearchResult, missing: Shortfall) -> RenderableType:
    """By how much it misses, and what would fit."""
    parts: list[RenderableType] = [
        Text(heading, style="bold"),
        Text(search_line(found)),
        Text(missing.sentence[0].upper() + missing.sentence[1:] + ".", style="bold red"),
    ]
    if missing.nearest is not None:
        parts.append(Text(f"  the smallest: {short_config(missing.nearest.config)}"))
    if missing.remedies:
        parts.append(Text("What would fit:", style="bold"))
        parts += [Text(f"  {remedy.sentence}: {short_config(remedy.config)}") for remedy in missing.remedies]
    return Group(*parts)


def search_line(found: SearchResult) -> str:
    counts = found.counts
    return (
        f"{whole(counts.enumerated)} legal configurations, {whole(counts.evaluated)} of them priced in "
        f"{seconds(counts.seconds)} (a lower bound rules out the others), {whole(counts.feasible)} of these fit"
        if counts.evaluated < counts.enumerated
        else f"{whole(counts.evaluated)} legal configurations priced in {seconds(counts.seconds)}, "
        f"{whole(counts.feasible)} fit"
    )


def rule_of_thumb_line(found: SearchResult) -> str:
    thumb = found.rule_of_thumb
    if thumb is None or found.gain is None:
        return "  finds no plan that fits."
    gain = f"{found.gain - 1:.1%} faster" if found.gain >= 1 else f"{1 - found.gain:.1%} slower"
    return (
        f"  {short_config(thumb.config)}: {whole(thumb.throughput.tokens_per_s_per_gpu)} tokens/s per GPU, "
        f"{gib(thumb.memory.peak.total_bytes)} GiB; the best plan above is {gain}."
    )


def ranked_table(plans: Sequence[Estimate], title: str) -> Table:
    """One line per plan, best first. Axes that no plan uses have no column."""
    axes = [axis for axis in SPLIT_COLUMNS if axis in ("dp", "pp", "tp") or any(_size(p, axis) > 1 for p in plans)]
    how = ("schedule", "micro", "ZeRO", "recompute", "sp")
    figures = ("GiB", "step", "tok/s/GPU", "TFLOP/s", "MFU")
    made = table(title, "#", *axes, *how, *figures, expendable=("TFLOP/s", "sp", "step"))
    for number, plan in enumerate(plans, start=1):
        made.add_row(
            str(number),
            *(str(_size(plan, axis)) for axis in axes),
            *how_it_runs(plan.config),
            gib(plan.memory.peak.total_bytes),
            seconds(plan.time.step_s),
            whole(plan.throughput.tokens_per_s_per_gpu),
            whole(plan.throughput.model_tflops_per_gpu),
            percent(plan.throughput.mfu),
            style="bold" if number == 1 else "",
        )
    return made


def reasons_list(reasons: Sequence[str], first: int = 1) -> Table:
    """The reason of each place, numbered as in the ranked table."""
    made = Table.grid(padding=(0, 1))
    made.add_column(justify="right")
    made.add_column()
    for number, reason in enumerate(reasons, start=first):
        made.add_row(f" {number}", reason, style="bold" if number == 1 else "")
    return made


def how_it_runs(config: HybridParallelConfig) -> tuple[str, str, str, str, str]:
    """Schedule, micro batch, ZeRO, recompute and sequence parallel as narrow words."""
    name = SCHEDULES.get(config.schedule.value, config.schedule.value)
    schedule = (f"{name} v{config.vpp}" if config.vpp > 1 else name) if config.pp > 1 else "-"
    zero = f"{config.zero}/{config.zero_shards}" if config.zero and config.zero_shards else str(config.zero)
    every = f" 1/{config.recompute_every}" if config.recompute_every > 1 else ""
    recompute = "-" if config.recompute is Recompute.NONE else config.recompute.value + every
    return schedule, str(config.micro_batch), zero, recompute, "yes" if config.sequence_parallel else "-"


def _size(plan: Estimate, axis: str) -> int:
    return int(getattr(plan.config, axis))


def front_plot(front: Sequence[FrontPoint], width: int = 72) -> str:
    """Memory against speed: every plan for which no other is both smaller and faster."""
    points = sorted((point.memory_bytes / 2**30, point.tokens_per_s_per_gpu) for point in front)
    series = Series("plans that nothing beats in both", [x for x, _ in points], [y for _, y in points], joined=False)
    return plot([series], x_label="GiB per GPU", y_label="tokens/s per GPU", width=width, height=10)


def front_table(front: Sequence[FrontPoint], most: int = 8) -> Table:
    """The Pareto front, fastest first; of a long one evenly chosen points with both ends."""
    made = table(
        "Memory against speed: nothing is both smaller and faster than these", "plan", "GiB", "tok/s/GPU", "step"
    )
    for point in spread(front, most):
        made.add_row(
            short_config(point.config),
            gib(point.memory_bytes),
            whole(point.tokens_per_s_per_gpu),
            seconds(point.step_s),
        )
    return made


def spread(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` of the points, both ends among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def short_config(config: HybridParallelConfig) -> str:
    """'dp8 pp2 tp4 mb1 1f1b-i v5 ZeRO-1 sp': the configuration as one short line."""
    sizes = [
        f"{axis}{getattr(config, axis)}"
        for axis in SPLIT_COLUMNS
        if axis in ("dp", "pp", "tp") or getattr(config, axis) > 1
    ]
    schedule, micro_batch, zero, recompute, _ = how_it_runs(config)
    words = [*sizes, f"mb{micro_batch}", *([f"ZeRO-{zero}"] if config.dp * config.cp > 1 else [])]
    words += [schedule] if schedule != "-" else []
    words += [f"recompute {recompute}"] if recompute != "-" else []
    words += ["sp"] if config.sequence_parallel else []
    words += ["all-to-all"] if config.cp > 1 and config.cp_variant is ContextVariant.ALL_TO_ALL else []
    return " ".join(words)
