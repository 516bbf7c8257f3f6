"""Timelines as Chrome traces (chrome://tracing, ui.perfetto.dev): a process per stage or rank, a thread per stream.

Format: "Trace Event Format" (Google), complete events ("X") and names ("M"); times in microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshwright.files import write_named
from meshwright.simulation.timeline import StepTimeline, Stream


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """Something on a lane of a process. Events of one lane may not overlap but by nesting."""

    process: int
    lane: str
    category: str
    name: str
    start_s: float
    end_s: float
    args: dict[str, Any] = field(default_factory=dict[str, Any])


def trace_document(
    processes: Mapping[int, str], lanes: Sequence[str], events: Sequence[TraceEvent], other: dict[str, Any]
) -> dict[str, Any]:
    """The document of a trace viewer: processes by name, in each the lanes that it uses, in the order of `lanes`."""
    place = {lane: index for index, lane in enumerate(lanes)}
    found: list[dict[str, Any]] = []
    for process, name in processes.items():
        found.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}})
    for process, index, lane in sorted({(e.process, place[e.lane], e.lane) for e in events}):
        found.append({"ph": "M", "name": "thread_name", "pid": process, "tid": index, "args": {"name": lane}})
    for event in events:
        described: dict[str, Any] = {
            "ph": "X",
            "name": event.name,
            "cat": event.category,
            "pid": event.process,
            "tid": place[event.lane],
            "ts": microseconds(event.start_s),
            "dur": microseconds(event.end_s - event.start_s),
        }
        found.append(described | ({"args": event.args} if event.args else {}))
    return {"displayTimeUnit": "ms", "traceEvents": found, "otherData": other}


def microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def chrome_trace(timeline: StepTimeline) -> dict[str, Any]:
    """A simulated step as the document of a trace viewer."""
    events = [
        TraceEvent(
            *(span.stage, span.stream.value, span.stream.value, span.name, span.start_s, span.end_s),
            {"exposed_us": microseconds(span.exposed_s)} if span.exposed_s > 0 else {},
        )
        for span in timeline.spans
    ]
    stages = {stage: f"stage {stage}" for stage in range(timeline.stages)}
    return trace_document(stages, [stream.value for stream in Stream], events, {"step_s": timeline.step_s})


def write_document(document: dict[str, Any], path: Path) -> None:
    """Write a trace whole or not at all."""
    write_named(path, json.dumps(document), "trace.json")


def write_trace(timeline: StepTimeline, path: Path) -> None:
    """Write a simulated step's trace."""
    write_document(chrome_trace(timeline), path)
