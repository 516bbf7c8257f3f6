"""Views of a recorded step: the Chrome trace, the plot, the document."""

from __future__ import annotations

from itertools import pairwise

from meshwright.measurements import RankTimeline, TimedCall, TimedWork
from meshwright.report.step_trace import overlap_document, step_plot, step_trace


def reduced(issued_s: float, ended_s: float, wait: tuple[float, float]) -> TimedCall:
    return TimedCall("dp", (0, 1), "all_reduce", "backward", "gradients", 8, -1, issued_s, ended_s, (wait,))


WORK = (
    TimedWork("F", 0, 0, 100.0, 102.0),
    TimedWork("B", 0, 0, 102.0, 106.0),
    TimedWork("optimizer", -1, -1, 108.0, 110.0),
)
CALLS = (reduced(104.0, 107.0, (106.0, 107.0)), reduced(105.0, 108.0, (107.0, 108.0)))
STEP = [RankTimeline(rank, 0, 3, 100.0, 110.0, WORK, CALLS) for rank in (0, 1)]


def test_calls_in_flight_together_are_on_lanes_of_their_own():
    document = step_trace(STEP)
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in document["traceEvents"] if e["name"] == "thread_name"}
    assert sorted(set(names.values())) == ["compute", "dp", "dp (2)", "stands waiting"]
    events = [e for e in document["traceEvents"] if e["ph"] == "X"]
    for lane in names:
        on_it = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if (e["pid"], e["tid"]) == lane)
        assert all(before[1] <= after[0] for before, after in pairwise(on_it))


def test_an_event_says_what_travels_and_what_of_it_was_waited_for():
    (event,) = [e for e in step_trace(STEP)["traceEvents"] if e["pid"] == 1 and e.get("ts") == 4e6]
    assert (event["name"], event["dur"]) == ("all_reduce gradients", 3e6)
    assert event["args"] == {"bytes": 8, "phase": "backward", "ranks": [0, 1], "exposed_us": 1e6, "late_us": 0}


def test_the_plot_shows_every_rank_and_what_it_waits_for_to_scale():
    assert step_plot(STEP, width=10).splitlines()[:2] == ["rank 0 |FFBBBBddoo|", "rank 1 |FFBBBBddoo|"]


def test_the_document_counts_what_is_hidden():
    document = overlap_document(STEP)
    assert (document["step"], document["step_s"]) == (3, 10.0)
    assert document["axes"]["dp"] == {
        "calls": 2.0, "bytes": 16.0, "in_flight_s": 4.0, "exposed_s": 2.0, "late_s": 0.0, "hidden": 0.5
    }  # fmt: skip
