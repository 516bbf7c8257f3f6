"""A simulated step as a person reads it: one row per stage, and what each axis exposes.

In: a `StepTimeline`. Out: text and rich renderables.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.report.fitted_table import Drawing, table
from meshwright.report.numbers import percent, seconds
from meshwright.simulation import Span, StepTimeline, Stream

WIDTH, MARGIN = 120, 12
MOST_ROWS = 32
"""Of a longer pipeline the first and last stages are drawn."""
Piece = tuple[str, float, float]
"""(letter, start, end)"""
LEGEND = "F forward   B backward   W weight gradients   d gradients and parameters   o optimizer   . idle"


def timeline_report(timeline: StepTimeline, width: int = WIDTH) -> RenderableType:
    """The plot, and the table of exposed communication."""
    title = Text("Simulated step", style="bold")
    head = f"{seconds(timeline.step_s)}, of which {seconds(timeline.tail_s)} after the last stage has finished"
    return Group(
        title, Text(head), Drawing(lambda most: timeline_plot(timeline, min(width, most - MARGIN))), _exposed(timeline)
    )


def timeline_plot(timeline: StepTimeline, width: int = WIDTH) -> str:
    """One row per stage; a column shows what filled most of its time."""
    shown = list(range(timeline.stages))
    if len(shown) > MOST_ROWS:
        shown = [*shown[: MOST_ROWS // 2], *shown[-MOST_ROWS // 2 :]]
    margin = len(f"stage {timeline.stages - 1}")
    lines = [f"{f'stage {stage}':<{margin}} |{_row(timeline, stage, width)}|" for stage in shown]
    if len(shown) < timeline.stages:
        lines.insert(MOST_ROWS // 2, f"{'...':<{margin}}  ({timeline.stages - len(shown)} more)")
    axis = f"{'':<{margin}}  0{seconds(timeline.replayed_s):>{width - 1}}"
    return "\n".join([*lines, axis, f"{'':<{margin}}  {LEGEND}"])


def _row(timeline: StepTimeline, stage: int, width: int) -> str:
    """Letters by time: compute first, state traffic where compute is idle."""
    spans = timeline.of_stage(stage)
    compute, state = (
        [(_letter(s), s.start_s, s.end_s) for s in spans if s.stream is stream]
        for stream in (Stream.COMPUTE, Stream.DP)
    )
    return letters(compute, timeline.replayed_s or 1.0, width, state)


def letters(pieces: Iterable[Piece], total_s: float, width: int, where_idle: Iterable[Piece] = ()) -> str:
    """A row of letters for what filled most of each column's time ('.': nothing); `where_idle` counts where less than
    half of a column is taken."""
    filled: list[dict[str, float]] = [{} for _ in range(width)]
    _fill(filled, pieces, width / total_s, 1.0)
    _fill(filled, where_idle, width / total_s, 0.5)
    row: list[str] = []
    for column in filled:
        idle = 1.0 - sum(column.values())
        letter, share = max(column.items(), key=lambda item: item[1], default=(".", 0.0))
        row.append(letter if share >= idle else ".")
    return "".join(row)


def _fill(filled: list[dict[str, float]], pieces: Iterable[Piece], columns_per_s: float, most: float) -> None:
    """Add the share of every column that the pieces cover, where not more than `most` of it is taken."""
    for letter, start_s, end_s in pieces:
        first, last = start_s * columns_per_s, end_s * columns_per_s
        for column in range(int(first), min(int(last) + 1, len(filled))):
            share = min(last, column + 1) - max(first, column)
            taken = filled[column]
            if share > 0 and (most >= 1.0 or sum(taken.values()) < most):
                taken[letter] = taken.get(letter, 0.0) + share


def _letter(span: Span) -> str:
    if span.stream is Stream.DP:
        return "d"
    if span.name == "optimizer":
        return "o"
    return {"F": "F", "W": "W"}.get(span.name[:1], "B")


def _exposed(timeline: StepTimeline) -> Table:
    """Per axis: on the wire, and by how much the step would be shorter without."""
    made = table("Communication of the step", "axis", "on the wire", "exposed", "of the step")
    for axis, exposure in timeline.exposed.items():
        share = exposure.exposed_s / timeline.step_s
        made.add_row(axis, seconds(exposure.wire_s), seconds(exposure.exposed_s), percent(share))
    return made


def timeline_document(timeline: StepTimeline) -> dict[str, object]:
    """The summary in `--json`; the spans are in the trace."""
    return {
        "step_s": timeline.step_s,
        "replayed_s": timeline.replayed_s,
        "idle_fraction": timeline.bubble_fraction,
        "exposed": timeline.exposed,
    }
