"""Faults put into the traces of a sound job are found and named with rank, axis and action."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from tests.runtime.layouts import SEQ, layout
from tests.runtime.tiny import tiny

from meshwright.dryrun.job import DryJob
from meshwright.dryrun.match import Finding, unmatched
from meshwright.dryrun.progress import stuck
from meshwright.dryrun.proof import trace_ranks
from meshwright.dryrun.trace import Event
from meshwright.layout.config import Precision

Traces = dict[int, tuple[Event, ...]]
WRONG = 5
"""dp 1, pp 0, tp 1"""


@pytest.fixture(scope="module")
def traces() -> Traces:
    config = layout(dp=2, pp=2, tp=2, global_batch=4, precision=Precision.FP32)
    job = DryJob(config, tiny(layers=2), SEQ)
    return {t.rank: t.events for t in trace_ranks(job, range(config.world_size))}


def findings(traces: Traces) -> tuple[Finding, ...]:
    return unmatched(traces) or stuck(traces)


def changed(traces: Traces, change: Callable[[list[Event]], None]) -> Traces:
    events = list(traces[WRONG])
    change(events)
    return traces | {WRONG: tuple(events)}


def place(events: list[Event], axis: str, number: int) -> int:
    """Where the call `number` on an axis stands."""
    return [i for i, e in enumerate(events) if e.axis == axis][number]


def test_a_sound_job_has_no_findings(traces: Traces) -> None:
    assert findings(traces) == ()


@pytest.mark.parametrize(("axis", "number"), [("tp", 3), ("tp", 0), ("dp", 0), ("dp", -1)])
def test_a_collective_dropped_on_one_rank_is_named(traces: Traces, axis: str, number: int) -> None:
    at = place(list(traces[WRONG]), axis, number)
    dropped = traces[WRONG][at]
    (found,) = findings(changed(traces, lambda events: events.pop(at) and None))
    assert found.axis == axis
    assert found.action == dropped.action
    assert dropped.what in found.problem
    # of two members neither is in the majority: the lower rank counts as right
    assert found.rank == WRONG


def test_a_swapped_order_is_named(traces: Traces) -> None:
    events = list(traces[WRONG])
    at = next(i for i in range(len(events) - 1) if {e.axis for e in events[i : i + 2]} == {"tp"} and differ(events, i))

    def swap(events: list[Event]) -> None:
        events[at], events[at + 1] = events[at + 1], events[at]

    (found,) = findings(changed(traces, swap))
    assert (found.rank, found.axis, found.action) == (WRONG, "tp", events[at].action)
    assert "other order" in found.problem


def differ(events: list[Event], at: int) -> bool:
    one, other = events[at], events[at + 1]
    return one.group == other.group and one.what != other.what


def test_a_wrong_size_is_named(traces: Traces) -> None:
    at = place(list(traces[WRONG]), "tp", 4)

    def grow(events: list[Event]) -> None:
        events[at] = replace(events[at], call_bytes=events[at].call_bytes + 4)

    (found,) = findings(changed(traces, grow))
    assert (found.rank, found.axis, found.action) == (WRONG, "tp", traces[WRONG][at].action)
    assert f"{traces[WRONG][at].call_bytes + 4:,} bytes" in found.problem


def test_a_message_that_is_never_sent_is_named(traces: Traces) -> None:
    at = next(i for i, e in enumerate(traces[WRONG]) if e.peer is not None and e.collective == "send")
    lost = traces[WRONG][at]
    found = findings(changed(traces, lambda events: events.pop(at) and None))
    assert {f.axis for f in found} == {"pp"}
    assert found[0].rank in (WRONG, lost.peer)
    assert found[0].action.endswith(lost.action[2:].partition(".")[2])


def test_two_stages_that_wait_for_each_other_are_named(traces: Traces) -> None:
    """A stage that receives its first gradient before it has sent its last output."""
    events = list(traces[WRONG])
    forward = [i for i, e in enumerate(events) if e.what == "stage output"]
    back = next(i for i, e in enumerate(events) if e.what == "stage output gradient")

    def cycle(events: list[Event]) -> None:
        gradient = events.pop(back)
        events.insert(forward[0], replace(gradient, step=-2))

    found = findings(changed(traces, cycle))
    assert {f.rank for f in found} >= {WRONG, 7}
    mine = next(f for f in found if f.rank == WRONG)
    assert (mine.axis, mine.action) == ("pp", events[back].action)
