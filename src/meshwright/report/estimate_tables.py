"""One estimate as a person reads it: the verdict, memory by kind and stage, where every second goes, the traffic.

In: an `Estimate`. Out: rich renderables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.cost.confidence import Source
from meshwright.cost.estimate import TIME_PARTS, Estimate, Memory, StageMemory, StepTime
from meshwright.layout.config import ContextVariant, HybridParallelConfig, Recompute
from meshwright.ledger import MemoryKind, TrafficEntry
from meshwright.report.fitted_table import Drawing, table
from meshwright.report.numbers import gib, percent, seconds, size, whole
from meshwright.report.plots import bars

MOST_BAR, BESIDE_BAR = 40, 50
"""Columns of the longest bar; of what stands beside it (the longest name, seconds, percent)."""
MOST_STAGE_COLUMNS = 6

PART_NAMES: Mapping[str, str] = {
    "forward": "forward pass",
    "backward": "backward pass",
    "recompute": "recomputed forward",
    "tp": "tp: waiting for collectives",
    "cp": "cp: waiting for collectives",
    "ep": "ep: waiting for all-to-all",
    "pp": "pp: waiting for send/receive",
    "dp": "dp: waiting for collectives",
    "bubble": "pipeline bubble",
    "optimizer": "optimizer step",
    "host": "host and launch overhead",
}


def config_line(config: HybridParallelConfig) -> str:
    """The split in one line: axes that do something, then how the step is run."""
    sizes = [("dp", config.dp), ("pp", config.pp), ("cp", config.cp), ("tp", config.tp)]
    axes = " x ".join(f"{name} {value}" for name, value in sizes if value > 1) or "one device"
    words = [f"micro batch {config.micro_batch}"]
    if config.ep > 1 or config.expert_tp > 1:
        words.insert(0, f"ep {config.ep}" + (f" x expert-tp {config.expert_tp}" if config.expert_tp > 1 else ""))
    if config.pp > 1:
        words.append(config.schedule.value + (f" (vpp {config.vpp})" if config.vpp > 1 else ""))
    if config.dp * config.cp > 1:
        words.append(zero_word(config))
    words.append(recompute_word(config))
    if config.sequence_parallel:
        words.append("sequence parallel")
    if config.cp > 1 and config.cp_variant is ContextVariant.ALL_TO_ALL:
        words.append("cp by all-to-all")
    words.append(config.precision.value)
    return f"{axes}; {', '.join(words)}"


def zero_word(config: HybridParallelConfig) -> str:
    shards = f" over {config.zero_shards}" if config.zero and config.zero_shards else ""
    return f"ZeRO-{config.zero}{shards}"


def recompute_word(config: HybridParallelConfig) -> str:
    if config.recompute is Recompute.NONE:
        return "no recompute"
    every = f" (1 layer in {config.recompute_every})" if config.recompute_every > 1 else ""
    return f"{config.recompute.value} recompute{every}"


def estimate_report(estimate: Estimate, heading: str, links: Mapping[str, str] | None = None) -> RenderableType:
    """The whole report of one configuration; `links` names the link that each axis crosses."""
    return Group(
        Text(heading, style="bold"),
        Text(config_line(estimate.config)),
        verdict(estimate),
        Text(),
        memory_table(estimate.memory),
        Text(),
        Text("Where every second of a step goes", style="bold"),
        time_bars(estimate.time),
        Text(),
        efficiency_line(estimate),
        confidence_lines(estimate),
        Text(),
        traffic_table(estimate, links),
    )


def verdict(estimate: Estimate) -> Text:
    """Does it fit, and how fast is it."""
    memory, rates = estimate.memory, estimate.throughput
    peak = memory.peak
    spare = memory.capacity_bytes - peak.total_bytes
    room = f"stage {peak.stage} needs {gib(peak.total_bytes)} of {gib(memory.capacity_bytes)} GiB"
    fit = (
        Text(f"Fits: {room}, {gib(spare)} GiB to spare.", style="green")
        if memory.fits
        else Text(f"Does not fit: {room}, {gib(-spare)} GiB too much.", style="bold red")
    )
    speed = (
        f"\nStep {seconds(estimate.time.step_s)}; {whole(rates.tokens_per_s)} tokens/s, "
        f"{whole(rates.tokens_per_s_per_gpu)} per GPU; {whole(rates.model_tflops_per_gpu)} model TFLOP/s per GPU; "
        f"MFU {percent(rates.mfu)} ({percent(rates.mfu_causal)} with causal attention FLOPs), HFU {percent(rates.hfu)}."
    )
    return fit.append(speed, style="default not bold")


def memory_table(memory: Memory) -> Table:
    """GiB per rank by kind and stage: a column per stage, of a long pipeline a row per stage."""
    kinds = [kind for kind in MemoryKind if any(stage.bytes_by_kind.get(kind, 0) for stage in memory.stages)]
    if len(memory.stages) > MOST_STAGE_COLUMNS:
        return _memory_by_rows(memory, kinds)
    made = table(
        f"Memory of one rank, GiB{_not_shown(memory)}", "kind", *(_stage_name(memory, stage) for stage in memory.stages)
    )
    for kind in kinds:
        made.add_row(_words(kind), *(gib(stage.bytes_by_kind.get(kind, 0)) for stage in memory.stages))
    made.add_section()
    made.add_row("total", *(gib(stage.total_bytes) for stage in memory.stages), style="bold")
    made.add_row("of the device", *(gib(memory.capacity_bytes) for _ in memory.stages))
    return made


def _memory_by_rows(memory: Memory, kinds: Sequence[MemoryKind]) -> Table:
    """One row per stage."""
    title = f"Memory of one rank, GiB of {gib(memory.capacity_bytes)}{_not_shown(memory)}"
    made = table(title, "stage", *map(_words, kinds), "total", expendable=("temporaries", "buffers", "reserved"))
    for stage in memory.stages:
        values = (gib(stage.bytes_by_kind.get(kind, 0)) for kind in kinds)
        fullest = stage.stage == memory.peak.stage
        made.add_row(_stage_name(memory, stage), *values, gib(stage.total_bytes), style="bold" if fullest else "")
    return made


def _not_shown(memory: Memory) -> str:
    """A word on the stages between those listed: an estimate keeps the fullest of those that hold the same layers."""
    numbers = [stage.stage for stage in memory.stages]
    return " (stages between these need no more)" if numbers[-1] - numbers[0] >= len(numbers) else ""


def _stage_name(memory: Memory, stage: StageMemory) -> str:
    return f"stage {stage.stage}" + (" (peak)" if stage.stage == memory.peak.stage else "")


def _words(kind: MemoryKind) -> str:
    return kind.value.replace("_", " ")


def time_bars(time: StepTime) -> RenderableType:
    """A bar per part that takes time; the parts sum to the step."""
    step = time.step_s
    parts = [(PART_NAMES[name], time.parts_s.get(name, 0.0)) for name in TIME_PARTS]
    shown = [(name, value, f"{seconds(value):>9}  {percent(value / step):>7}") for name, value in parts if value > 0]
    hidden = ", ".join(f"{axis} {seconds(value)}" for axis, value in time.hidden_s.items() if value > 0)
    below = f"\nhidden behind compute: {hidden}" if hidden else ""
    return Drawing(lambda width: bars(shown, max(4, min(MOST_BAR, width - BESIDE_BAR))) + below)


def efficiency_line(estimate: Estimate) -> Text:
    """The factors whose product is the MFU."""
    kept = {name: value for name, value in estimate.efficiency.items() if f"{value:.3f}" != "1.000"}
    factors = " x ".join(f"{name} {value:.3f}" for name, value in kept.items())
    return Text(f"MFU {estimate.throughput.mfu:.3f} = {factors}")


def range_line(estimate: Estimate) -> str:
    """The range that four of five runs lie in."""
    one = estimate.confidence
    step = " to ".join(seconds(value) for value in one.step_s)
    memory = " to ".join(gib(value) for value in one.memory_bytes)
    return f"Range that four of five published runs lie in: step {step}, memory {memory} GiB."


def confidence_lines(estimate: Estimate) -> Text:
    """The range, and which inputs were measured, interpolated or assumed."""
    named = {source: [i.name for i in estimate.confidence.inputs if i.source is source] for source in Source}
    told = [f"{source.value}: {', '.join(names)}" for source, names in named.items() if names]
    return Text(f"{range_line(estimate)}\n  inputs {'; '.join(told)}")


def traffic_table(estimate: Estimate, links: Mapping[str, str] | None = None) -> RenderableType:
    """The ledger of the busiest stage: what one rank sends per step, by axis; `links` names the link of an axis."""
    if not any(estimate.traffic.values()):
        return Text("No traffic: one device.")
    stage = max(estimate.traffic, key=lambda s: sum(entry.total_bytes for entry in estimate.traffic[s]))
    columns = ("axis", "collective", "phase", "what", *(("link",) if links else ()))
    title = f"What one rank of stage {stage} sends and receives per step (the busiest stage)"
    made = table(title, *columns, "ranks", "calls", "per call", "total", left=len(columns))
    for entry in estimate.traffic[stage]:
        link = (links.get(entry.axis, "-"),) if links else ()
        made.add_row(entry.axis, entry.collective.value, entry.phase.value, entry.what, *link, *_amounts(entry))
    return made


def _amounts(entry: TrafficEntry) -> tuple[str, str, str, str]:
    per_call = size(entry.total_bytes / entry.calls) if entry.calls else "-"
    return whole(entry.group_size), whole(entry.calls), per_call, size(entry.total_bytes)
