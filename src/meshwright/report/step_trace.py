"""A recorded step as a person reads it: one row per rank, what each axis hides, and the Chrome trace of it all.

In: the `RankTimeline`s of all ranks of a step. Out: text and rich renderables, and JSON documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.doctor.overlap import AxisOverlap, MatchedCall, axis_overlap, length, matched, union
from meshwright.measurements import RankTimeline
from meshwright.report.fitted_table import Drawing, table
from meshwright.report.numbers import percent, seconds, size
from meshwright.report.timeline_plot import MARGIN, MOST_ROWS, WIDTH, Piece, letters
from meshwright.simulation.chrome import TraceEvent, microseconds, trace_document

COMPUTE, WAITING = "compute", "stands waiting"
LEGEND = "F forward   B backward   W weight gradients   o optimizer   waiting for: t tp  p pp  d dp  c cp  e experts"
LETTERS = {"tp": "t", "tp_cp": "t", "pp": "p", "dp": "d", "cp": "c", "embedding": "d"}


def step_report(timelines: Sequence[RankTimeline]) -> RenderableType:
    """The plot, and the table of what each axis hides."""
    first, last = _bounds(timelines)
    title = Text(f"Step {timelines[0].step} as it was", style="bold")
    plot = Drawing(lambda most: step_plot(timelines, min(WIDTH, most - MARGIN)))
    return Group(title, Text(seconds(last - first)), plot, _overlap_table(axis_overlap(timelines), last - first))


def step_plot(timelines: Sequence[RankTimeline], width: int = WIDTH) -> str:
    """One row per rank; a column shows what filled most of its time."""
    first, last = _bounds(timelines)
    margin = len(f"rank {timelines[-1].rank}")
    lines: list[str] = []
    for timeline in timelines[:MOST_ROWS]:
        row = letters([(letter, a - first, b - first) for letter, a, b in _pieces(timeline)], last - first, width)
        lines.append(f"{f'rank {timeline.rank}':<{margin}} |{row}|")
    if len(timelines) > MOST_ROWS:
        lines.append(f"{'...':<{margin}}  ({len(timelines) - MOST_ROWS} more)")
    axis = f"{'':<{margin}}  0{seconds(last - first):>{width - 1}}"
    return "\n".join([*lines, axis, f"{'':<{margin}}  {LEGEND}"])


def step_trace(timelines: Sequence[RankTimeline]) -> dict[str, Any]:
    """The step as a Chrome trace: what a rank computes, where it stands waiting, and each axis' calls, those that are
    in flight together on lanes of their own."""
    first, last = _bounds(timelines)
    events: list[TraceEvent] = []
    for timeline in timelines:
        for work in timeline.work:
            span = (work.start_s - first, work.end_s - first)
            events.append(TraceEvent(timeline.rank, COMPUTE, COMPUTE, work.name, *span))
        for axis, start, end in _waits(timeline):
            events.append(TraceEvent(timeline.rank, WAITING, WAITING, axis, start - first, end - first))
    lanes = [COMPUTE, WAITING]
    calls = matched(timelines)
    for axis in dict.fromkeys(m.call.axis for m in calls):
        for rank in (t.rank for t in timelines):
            own = [m for m in calls if m.call.axis == axis and m.rank == rank]
            for lane, call in _on_lanes(axis, own):
                lanes += [] if lane in lanes else [lane]
                events.append(_event(lane, call, first))
    names = {t.rank: f"rank {t.rank} (stage {t.stage})" for t in timelines}
    return trace_document(names, lanes, events, {"step": timelines[0].step, "step_s": last - first})


def overlap_document(timelines: Sequence[RankTimeline]) -> dict[str, Any]:
    """The table in `--json`; the calls are in the trace."""
    first, last = _bounds(timelines)
    axes = {
        a.axis: {
            "calls": a.calls,
            "bytes": a.call_bytes,
            "in_flight_s": a.in_flight_s,
            "exposed_s": a.exposed_s,
            "late_s": a.late_s,
            "hidden": a.hidden,
        }
        for a in axis_overlap(timelines)
    }
    return {"step": timelines[0].step, "step_s": last - first, "axes": axes}


def _overlap_table(axes: Sequence[AxisOverlap], step_s: float) -> Table:
    made = table(
        "Communication of the step, mean of the ranks",
        *("axis", "calls", "bytes", "in flight", "exposed", "of the step", "hidden", "for late ranks"),
        expendable=("calls", "bytes"),
    )
    for a in axes:
        made.add_row(
            *(a.axis, f"{a.calls:g}", size(a.call_bytes), seconds(a.in_flight_s), seconds(a.exposed_s)),
            *(percent(a.exposed_s / step_s), percent(a.hidden), seconds(a.late_s)),
        )
    return made


def _bounds(timelines: Sequence[RankTimeline]) -> tuple[float, float]:
    return min(t.start_s for t in timelines), max(t.end_s for t in timelines)


def _waits(timeline: RankTimeline) -> list[tuple[str, float, float]]:
    """(axis, start, end) of every time that the rank stood in communication; one wait may end several calls."""
    found = {(start, end): call.axis for call in timeline.calls for start, end in call.waits}
    return [(axis, *interval) for interval, axis in sorted(found.items())]


def _pieces(timeline: RankTimeline) -> Iterable[Piece]:
    """What fills the rank's time: computing without the waits inside it, and the waits."""
    waits = _waits(timeline)
    standing = union((start, end) for _, start, end in waits)
    for work in timeline.work:
        letter, start = {"I": "B", "optimizer": "o"}.get(work.kind, work.kind), work.start_s
        for a, b in standing:
            if a < work.end_s and b > start:
                yield letter, start, a
                start = b
        yield letter, start, work.end_s
    for axis, start, end in waits:
        yield LETTERS.get(axis, "e"), start, end


def _on_lanes(axis: str, calls: Sequence[MatchedCall]) -> list[tuple[str, MatchedCall]]:
    """Each call on the first lane of its axis that is free when it is issued."""
    free: list[float] = []
    found: list[tuple[str, MatchedCall]] = []
    for call in sorted(calls, key=lambda m: m.call.issued_s):
        lane = next((i for i, until in enumerate(free) if until <= call.call.issued_s), len(free))
        free[lane : lane + 1] = [max(call.end_s, call.call.issued_s)]
        found.append((axis if lane == 0 else f"{axis} ({lane + 1})", call))
    return found


def _event(lane: str, matched_call: MatchedCall, first: float) -> TraceEvent:
    call = matched_call.call
    args: dict[str, Any] = {
        "bytes": call.call_bytes,
        "phase": call.phase,
        "ranks": list(call.ranks),
        "exposed_us": microseconds(length(matched_call.exposed)),
        "late_us": microseconds(length(matched_call.late)),
    }
    if call.peer >= 0:
        args["peer"] = call.peer
    start, end = call.issued_s - first, max(matched_call.end_s, call.issued_s) - first
    return TraceEvent(matched_call.rank, lane, call.axis, f"{call.collective} {call.what}", start, end, args)
