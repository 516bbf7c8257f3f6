"""A timeline as a Chrome trace (chrome://tracing, ui.perfetto.dev): a process per stage, a thread per stream.

Format: "Trace Event Format" (Google), complete events ("X") and names ("M"); times in microseconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from meshwright.files import write_named
from meshwright.simulation.timeline import StepTimeline, Stream


def chrome_trace(timeline: StepTimeline) -> dict[str, Any]:
    """The document of a trace viewer."""
    lanes = {stream: lane for lane, stream in enumerate(Stream)}
    used = sorted({(span.stage, lanes[span.stream], span.stream.value) for span in timeline.spans})
    events: list[dict[str, Any]] = []
    for stage in range(timeline.stages):
        events.append({"ph": "M", "name": "process_name", "pid": stage, "args": {"name": f"stage {stage}"}})
    for stage, lane, name in used:
        events.append({"ph": "M", "name": "thread_name", "pid": stage, "tid": lane, "args": {"name": name}})
    for span in timeline.spans:
        event: dict[str, Any] = {
            "ph": "X",
            "name": span.name,
            "cat": span.stream.value,
            "pid": span.stage,
            "tid": lanes[span.stream],
            "ts": round(span.start_s * 1e6, 3),
            "dur": round((span.end_s - span.start_s) * 1e6, 3),
        }
        if span.exposed_s > 0:
            event["args"] = {"exposed_us": round(span.exposed_s * 1e6, 3)}
        events.append(event)
    return {"displayTimeUnit": "ms", "traceEvents": events, "otherData": {"step_s": timeline.step_s}}


def write_trace(timeline: StepTimeline, path: Path) -> None:
    """Write the trace whole or not at all."""
    write_named(path, json.dumps(chrome_trace(timeline)), "trace.json")
