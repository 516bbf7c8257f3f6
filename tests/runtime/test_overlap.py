"""What runs beside computing in a real step, from its recorded timeline: when calls are issued and first waited for."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from meshwright.errors import InputError
from meshwright.measurements import RankTimeline, TimedCall, TimedWork
from meshwright.runtime.trainer import train_forked

from .jobs import SEQ, VOCABULARY, job
from .layouts import INTERLEAVED
from .tiny import tiny

HALF_A_BATCH = {"micro_batch": 2}
FASTEST_CORE = 250e9
"""Operations per second in fp32: two fused multiply-adds of 16 lanes a cycle at 3.9 GHz."""
WIDE = {"hidden": 512, "mlp": 1408, "kv_heads": 4}


def traced(folder: Path, layout: dict[str, Any], **model: Any) -> list[RankTimeline]:
    """The timelines of the second step of two."""
    made = job(folder, "run", 2, layout, tiny(vocab=VOCABULARY, **model), trace=True)
    found = [outcome.timeline for outcome in train_forked(made)]
    assert all(t is not None and t.step == 2 for t in found)
    return [t for t in found if t is not None]


def computes_meanwhile(timeline: RankTimeline, call: TimedCall) -> list[TimedWork]:
    """What the rank begins and ends, or ends, after the call is issued and before it first waits for it (posting the
    call is no waiting for it)."""
    waited = min((start for start, _ in call.waits[1:]), default=timeline.end_s)
    return [work for work in timeline.work if call.issued_s < work.end_s <= waited]


def test_gradients_of_replicas_are_reduced_while_backward_still_runs(tmp_path: Path):
    for timeline in traced(tmp_path, {"dp": 2, **HALF_A_BATCH}, **WIDE):  # two slices of the flat buffer
        last = [work for work in timeline.work if work.kind == "B"][-1]
        slices = [call for call in timeline.calls if call.what == "layer gradients"]
        assert len(slices) == 2
        assert last.start_s < slices[0].issued_s < last.end_s
        assert last in computes_meanwhile(timeline, slices[0])
        assert (slices[0].ended_s or 0.0) > slices[0].issued_s


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_gradient_of_a_blocks_input_is_summed_over_tp_while_weight_gradients_are_computed(
    tmp_path: Path, sequence_parallel: bool
):
    layout = {"tp": 2, "sequence_parallel": sequence_parallel, **HALF_A_BATCH}
    blocks, microbatches = 2 * 4, 4
    of_queries_keys_values = 2 * (2 * SEQ) * (3 * 512 // 2) * 512  # operations; an MLP's are more
    for timeline in traced(tmp_path, layout, **WIDE):
        sums = [call for call in timeline.calls if (call.phase, call.what) == ("backward", "block input")]
        assert len(sums) == microbatches * blocks
        for call in sums:
            posted, waited_for = call.waits
            assert waited_for[0] - posted[1] >= of_queries_keys_values / FASTEST_CORE


def test_a_stage_computes_while_what_it_has_sent_is_on_its_way(tmp_path: Path):
    first, last = traced(tmp_path, {"pp": 2, **HALF_A_BATCH})
    outputs = [call for call in first.calls if call.what == "stage output"]
    gradients = [call for call in last.calls if call.what == "stage input gradient"]
    assert len(outputs) == len(gradients) == 4
    # nothing is left to compute after a stage's last message but the optimizer, which waits for it
    for timeline, calls in ((first, outputs[:-1]), (last, gradients[:-1])):
        assert all(computes_meanwhile(timeline, call) for call in calls)


def test_receives_are_posted_before_other_work_where_the_schedule_has_slack(tmp_path: Path):
    timelines = traced(tmp_path, {"pp": 2, **HALF_A_BATCH, **INTERLEAVED})
    received = [(t, call) for t in timelines for call in t.calls if call.collective == "receive"]
    assert any(computes_meanwhile(timeline, call) for timeline, call in received)


def test_all_calls_and_waits_of_a_step_are_in_its_timeline(tmp_path: Path):
    made = job(tmp_path, "run", 2, {"dp": 2, "pp": 2, "tp": 2, "sequence_parallel": True, "zero": 2}, trace=True)
    for outcome in train_forked(made):
        assert outcome.timeline is not None
        recorded = {(e.axis, e.collective, e.phase, e.what): (e.calls, e.total_bytes) for e in outcome.ledger}
        found: dict[Any, tuple[int, int]] = {}
        for call in outcome.timeline.calls:
            line = (call.axis, call.collective, call.phase, call.what)
            calls, size = found.get(line, (0, 0))
            found[line] = (calls + 1, size + call.call_bytes)
            assert call.ended_s is not None
            assert call.waits
        assert found == recorded
        assert all(a.end_s <= b.start_s for a, b in pairwise(outcome.timeline.work))


def test_a_step_that_the_run_does_not_do_cannot_be_traced(tmp_path: Path):
    from meshwright.runtime.launch import RankFailedError

    with pytest.raises((InputError, RankFailedError), match="--trace-step 3: this run does steps 1 to 2"):
        train_forked(job(tmp_path, "run", 2, {}, trace=True, trace_step=3))
