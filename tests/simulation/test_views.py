"""Views of a timeline: the Chrome trace, the terminal plot, the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshwright.cli import main
from meshwright.errors import InputError
from meshwright.report.timeline_plot import timeline_plot
from meshwright.simulation import Exposure, Span, StepTimeline, Stream, chrome_trace, write_trace

TIMELINE = StepTimeline(
    stages=2,
    microbatches=1,
    spans=(
        Span(0, Stream.COMPUTE, "F0.0", 0.0, 1.0),
        Span(0, Stream.SEND, "activations 0.0 to stage 1", 1.0, 1.5, 0.5),
        Span(0, Stream.COMPUTE, "B0.0", 4.0, 6.0),
        Span(0, Stream.DP, "reduce gradients of chunk 0", 6.0, 8.0),
        Span(1, Stream.COMPUTE, "F1.0", 1.5, 2.5),
        Span(1, Stream.COMPUTE, "B1.0", 2.5, 4.0),
    ),
    tail_s=0.25,
    exposed={"pp": Exposure(0.5, 0.5)},
)
SIZES = {"--gpus": 8, "--seq": 4096, "--global-batch": 16, "--tp": 2, "--pp": 2, "--zero": 1}
JOB = ["llama-3.1-8b", "--cluster", "h100-sxm", *(str(word) for pair in SIZES.items() for word in pair)]


def test_the_trace_has_an_event_per_span_in_microseconds() -> None:
    document = chrome_trace(TIMELINE)
    events = [e for e in document["traceEvents"] if e["ph"] == "X"]
    assert len(events) == len(TIMELINE.spans)
    assert events[1] == {
        "ph": "X",
        "name": "activations 0.0 to stage 1",
        "cat": "pp send",
        "pid": 0,
        "tid": 4,
        "ts": 1e6,
        "dur": 5e5,
        "args": {"exposed_us": 5e5},
    }
    assert document["otherData"]["step_s"] == 8.25


def test_every_stream_of_the_trace_is_named() -> None:
    events = chrome_trace(TIMELINE)["traceEvents"]
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} == named


def test_the_plot_shows_every_stage_to_scale() -> None:
    rows = timeline_plot(TIMELINE, width=16).splitlines()
    assert rows[0] == "stage 0 |FF......BBBBdddd|"
    assert rows[1] == "stage 1 |...FFBBB........|"


def test_a_trace_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_trace(TIMELINE, tmp_path / "step.json")
    assert json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    assert [p.name for p in tmp_path.iterdir()] == ["step.json"]
    with pytest.raises(InputError, match="cannot be written"):
        write_trace(TIMELINE, tmp_path / "nowhere" / "step.json")


def test_estimate_writes_a_trace_and_says_what_is_exposed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "step.json"
    assert main(["estimate", *JOB, "--trace", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads(file.read_text())["otherData"]["step_s"] == pytest.approx(found["simulation"]["step_s"])
    assert set(found["simulation"]["exposed"]) == {"tp", "pp", "dp"}


def test_estimate_draws_the_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *JOB, "--trace", str(tmp_path / "step.json")]) == 0
    assert "stage 1 |" in capsys.readouterr().out


def test_a_trace_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *JOB, "--trace", str(tmp_path / "no" / "step.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
