"""The doctor's findings as a person reads them: memory and cures, the waterfall and faults, links, predictions.

In: the doctor's reports. Out: rich renderables.
"""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.doctor.comparison import Comparison, Row
from meshwright.doctor.cures import Cure
from meshwright.doctor.efficiency import EfficiencyReport
from meshwright.doctor.experts import ExpertLoad
from meshwright.doctor.links import LinkReport
from meshwright.doctor.oom import OomEvent, OomReport, RankBytes
from meshwright.report.estimate_tables import memory_table, table
from meshwright.report.numbers import gib, percent, seconds, size
from meshwright.report.plots import bars

SHOWN_RANKS = 16
SHOWN_LINKS = 60
MOST_LAYERS = 6


def place_words(coordinates: Mapping[str, int]) -> str:
    """'dp1 pp0 tp3'."""
    return " ".join(f"{axis}{value}" for axis, value in coordinates.items()) or "?"


def oom_report(report: OomReport) -> RenderableType:
    """Event, memory by rank and stage, cures."""
    parts: list[RenderableType] = []
    if report.event is not None:
        parts += [event_text(report.event), Text()]
    parts.append(_fit_text(report))
    if report.ranks:
        parts += [Text(), rank_memory_table(report.ranks)]
    parts += [Text(), memory_table(report.predicted.memory)]
    if report.cures:
        parts += [Text(), cure_table(report.cures)]
    return Group(*parts, *_notes(report.notes))


def event_text(event: OomEvent) -> Text:
    """Who was refused what, and where in the step."""
    refusal = event.refusal
    who = f"{place_words(event.coordinates)} (rank {event.rank}, {event.host})"
    if refusal.by == "kernel":
        line = f"{who} was killed by the kernel for want of memory"
    else:
        asked = "memory" if refusal.requested_bytes is None else size(refusal.requested_bytes)
        line = f"{who} was refused {asked} on the {refusal.by}"
    where = [f"step {event.step}"] if event.step is not None else []
    if event.action is not None:
        where.append(event.action.replace("_", " "))
    if event.microbatch is not None:
        where.append(f"microbatch {event.microbatch}")
    if event.module is not None:
        where.append(event.module)
    lines = [line + (": " + ", ".join(where) if where else "")]
    if event.looks_like is not None:
        lines.append(f"a tensor of that size: {event.looks_like}")
    if refusal.unused_bytes is not None:
        free = "" if refusal.free_bytes is None else f", {size(refusal.free_bytes)} free"
        lines.append(f"the allocator held {size(refusal.unused_bytes)} unused{free}")
    if refusal.fragmented:
        lines.append("fragmented: that would have been enough in one piece; set expandable_segments:True")
    return Text("\n".join(lines), style="bold red")


def _fit_text(report: OomReport) -> Text:
    peak = report.predicted.memory.peak
    words = f"fullest: stage {report.fullest_stage}; predicted peak {size(peak.total_bytes)} of "
    words += f"{size(report.question.capacity_bytes)} on stage {peak.stage}"
    if report.excess > 1.0:
        words += f"; {report.excess:.2f} times that was needed"
    return Text(words + (": fits" if report.fits else ": does not fit"), style="green" if report.fits else "bold red")


def rank_memory_table(ranks: tuple[RankBytes, ...]) -> Table:
    """The fullest ranks first."""
    made = table(
        f"memory of the {min(len(ranks), SHOWN_RANKS)} fullest ranks of {len(ranks)}",
        *("rank", "host", "where", "allocated", "reserved", "peak", "predicted", "parameters", "gradients"),
        *("optimizer", "activations and rest"),
        left=3,
    )
    for rank in sorted(ranks, key=lambda r: -(r.peak_bytes or 0))[:SHOWN_RANKS]:
        kinds = (rank.by_kind.get(kind) for kind in ("parameters", "gradients", "optimizer", "activations"))
        known = (rank.allocated_bytes, rank.reserved_bytes, rank.peak_bytes, rank.predicted_bytes, *kinds)
        cells = ("-" if value is None else size(value) for value in known)
        made.add_row(str(rank.rank), rank.host, place_words(rank.coordinates), *cells)
    return made


def cure_table(cures: tuple[Cure, ...]) -> Table:
    """What each cure saves and costs."""
    made = table("cures, the best first", "#", "change", "peak", "saves", "step", "", left=2)
    for number, cure in enumerate(cures, start=1):
        verdict = "fits" if cure.comfortable else "fits barely" if cure.fits else "not enough"
        cells = (size(cure.peak_bytes), size(cure.saved_bytes), f"{cure.slower:.2f}x", verdict)
        made.add_row(str(number), " + ".join(cure.changes), *cells, style=None if cure.fits else "dim")
    return made


def efficiency_report(report: EfficiencyReport, plot: bool = False) -> RenderableType:
    """Waterfall, axes, faults, changes."""
    parts = report.parts
    heading = (
        f"{report.steps} steps of {seconds(parts.step_s)} in the median (predicted {seconds(_predicted(report))}); "
        f"MFU {percent(report.mfu)}"
    )
    shown: list[RenderableType] = [Text(heading), Text(), waterfall_table(report)]
    if plot:
        rows = [(name, value, percent(value / parts.step_s)) for name, value in report.waterfall]
        shown += [Text(), Text(bars(rows))]
    shown += [Text(), _axis_table(report), Text(balance_words(report)), Text(), _fault_table(report)]
    if report.changes:
        shown += [Text(), _change_table(report)]
    return Group(*shown, *_notes(report.notes))


def _predicted(report: EfficiencyReport) -> float:
    return report.predicted.time.step_s


def waterfall_table(report: EfficiencyReport) -> Table:
    """From the step at peak to the step as it was: seconds added, and the MFU that is left."""
    made = table("where the step goes (a mean rank)", "", "seconds", "of the step", "MFU after", left=1)
    ideal, total = report.parts.step_s * report.mfu, 0.0
    for name, value in report.waterfall:
        total += value
        made.add_row(name, seconds(value), percent(value / report.parts.step_s), percent(ideal / total))
    return made


def _axis_table(report: EfficiencyReport) -> Table:
    made = table(
        "axes", "axis", "groups on", "bytes a step", "transfer", "should take", "reached", "should reach", left=2
    )
    for use in report.axes:
        hosts = "; ".join(use.hosts)
        rates = (f"{r / 1e6:,.1f} MB/s" if r < 1e15 else "-" for r in (use.bytes_per_s, use.expected_bytes_per_s))
        made.add_row(
            use.axis, hosts[:60], size(use.step_bytes), seconds(use.transfer_s), seconds(use.expected_s), *rates
        )
    return made


def balance_words(report: EfficiencyReport) -> str:
    """Computing time over stages and tp ranks, load over experts, in one line each."""
    lines: list[str] = []
    for name, values in (("stages", report.parts.stage_compute_s), ("tp ranks", report.parts.tp_compute_s)):
        if len(values) > 1:
            lines.append(f"computing over {name}: {', '.join(seconds(v) for v in values)}")
    if report.experts is not None:
        lines += _load_lines(report.experts)
    return "\n".join(lines)


def _load_lines(load: ExpertLoad) -> list[str]:
    layers = sorted(load.layer_imbalance.items(), key=lambda item: -item[1])[:MOST_LAYERS]
    dropped = f"; {percent(load.dropped)} of the tokens' copies dropped" if load.dropped else ""
    return [
        f"load over experts, fullest over mean: {', '.join(f'layer {n} {v:.2f}' for n, v in layers)}{dropped}",
        f"rows over ep ranks, fullest over mean: {load.imbalance:.2f} (rank {load.slowest_rank})",
    ]


def _fault_table(report: EfficiencyReport) -> RenderableType:
    if not report.faults:
        return Text("no fault costs 2 % of a step", style="green")
    made = table("faults, the dearest first", "#", "fault", "costs a step", "what", left=2, text=("what",))
    for number, fault in enumerate(report.faults, start=1):
        made.add_row(str(number), fault.kind, seconds(fault.loss_s), fault.words)
    return made


def _change_table(report: EfficiencyReport) -> Table:
    made = table("what pays most", "#", "for", "saves a step", "how", left=2, text=("how",))
    for number, change in enumerate(report.changes, start=1):
        made.add_row(str(number), change.fault, seconds(change.saved_s), change.words)
    return made


def links_report(report: LinkReport) -> RenderableType:
    """Samples, slow links, the fitted links."""
    made = table("measured", "axis", "collective", "ranks", "hosts", "bytes", "time", "rate", left=4)
    for sample in report.samples.samples[:SHOWN_LINKS]:
        made.add_row(
            sample.axis,
            sample.collective.replace("_", " "),
            ", ".join(map(str, sample.ranks))[:40],
            ", ".join(sample.hosts)[:40],
            size(sample.call_bytes),
            seconds(sample.seconds),
            f"{sample.bytes_per_s / 1e6:,.1f} MB/s",
        )
    left = len(report.samples.samples) - SHOWN_LINKS
    lines = [f"... and {left} more (--json has all)"] if left > 0 else []
    lines += [f"SLOW {slow.kind}: {slow.name}, {slow.times:.1f} times what its like take" for slow in report.slow]
    for where, link in (("inside a host", report.intra), ("between hosts", report.inter)):
        if link is not None:
            lines.append(f"{where}: {link.bandwidth / 1e6:,.1f} MB/s, {seconds(link.latency_s)} a hop")
    lines.append(f"median error of these two numbers on the samples: {percent(report.error)}")
    return Group(made, Text("\n".join(lines)))


def comparison_table(comparison: Comparison) -> Table:
    """Predicted beside measured."""
    made = table("predicted and measured", "", "predicted", "measured", "predicted / measured", left=1)
    for row in comparison.rows:
        made.add_row(row.name, *_amounts(row), "-" if row.error is None else f"{row.error + 1.0:.2f}")
    return made


def _amounts(row: Row) -> tuple[str, str]:
    if row.unit == "bytes":
        return f"{gib(row.predicted)} GiB", f"{gib(row.measured)} GiB"
    return seconds(row.predicted), seconds(row.measured)


def _notes(notes: tuple[str, ...]) -> list[Text]:
    return [Text("\n".join(f"note: {note}" for note in notes), style="dim")] if notes else []
