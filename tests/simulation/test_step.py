"""The replayed step: it agrees with the cost model's closed form where stages are equal, and obeys its own rules."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from meshwright.cost.evaluate import estimate
from meshwright.cost.stack import default_stack
from meshwright.cost.workload import Workload
from meshwright.errors import InputError
from meshwright.hardware.load import load
from meshwright.layout.config import HybridParallelConfig, Schedule
from meshwright.models.from_config import spec_from_config
from meshwright.models.spec import ModelSpec
from meshwright.simulation import StepTimeline, Stream, simulate_step

CLUSTER = load("h100-sxm", gpus=64)
WORK = Workload(seq=4096)
BASE = HybridParallelConfig(dp=2, tp=8, pp=4, sequence_parallel=True, global_batch=64, zero=1)
TOLERANCE = {
    # stages are equal up to the embedding; what is left is where a stage waits for a message's last byte
    Schedule.GPIPE: 0.01,
    Schedule.ONE_F_ONE_B: 0.01,
    Schedule.INTERLEAVED: 0.01,
    Schedule.ZB_H1: 0.02,
    Schedule.ZBV: 0.02,
    Schedule.DUALPIPEV: 0.02,
}


def llama(**changed: object) -> ModelSpec:
    """A model whose head weighs next to nothing, so that stages are equal."""
    shape = {
        "model_type": "llama",
        "hidden_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "vocab_size": 1024,
    }
    return spec_from_config({**shape, **changed})


def config(schedule: Schedule = Schedule.ONE_F_ONE_B, **changed: int) -> HybridParallelConfig:
    chunks = {Schedule.INTERLEAVED: 4, Schedule.ZBV: 2, Schedule.DUALPIPEV: 2}.get(schedule, 1)
    return replace(BASE, schedule=schedule, vpp=chunks, **changed)


def step(of: HybridParallelConfig) -> StepTimeline:
    return simulate_step(llama(), CLUSTER, WORK, of)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_equal_stages_take_what_the_closed_form_says(schedule: Schedule) -> None:
    of = config(schedule)
    closed = estimate(llama(), CLUSTER, WORK, of).time.step_s
    assert step(of).step_s == pytest.approx(closed, rel=TOLERANCE[schedule])


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("micro", [1, 2])
def test_without_a_pipeline_the_closed_form_is_met_exactly(zero: int, micro: int) -> None:
    of = replace(BASE, pp=1, dp=8, zero=zero, micro_batch=micro)
    closed = estimate(llama(), CLUSTER, WORK, of).time.step_s
    assert step(of).step_s == pytest.approx(closed, rel=1e-3)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_streams_do_one_thing_at_a_time(schedule: Schedule) -> None:
    timeline = step(config(schedule))
    for stage in range(timeline.stages):
        for stream in (Stream.COMPUTE, Stream.DP):
            spans = sorted((s.start_s, s.end_s) for s in timeline.of_stage(stage) if s.stream is stream)
            assert all(first[1] <= second[0] + 1e-12 for first, second in pairwise(spans))


def test_a_stage_starts_when_its_message_has_arrived() -> None:
    timeline = step(config())
    first = {s.stage: s.start_s for s in reversed(timeline.spans) if s.name.startswith("F") and s.name.endswith(".0")}
    sent = {s.stage: s.end_s for s in timeline.spans if s.name.startswith("activations") and ".0 to" in s.name}
    assert all(first[stage + 1] == pytest.approx(end) for stage, end in sent.items())
    assert sorted(sent) == [0, 1, 2]


def test_work_of_all_microbatches_is_there_once() -> None:
    timeline = step(config())
    names = [s.name for s in timeline.spans if s.stream is Stream.COMPUTE and s.name != "optimizer"]
    assert len(names) == len(set(names)) == 2 * 4 * 32


def test_exposed_is_at_most_what_is_on_the_wire() -> None:
    timeline = step(config())
    assert set(timeline.exposed) == {"tp", "pp", "dp"}
    for axis, found in timeline.exposed.items():
        slack = 2.0 if axis == "pp" else 1.1  # a message delays a stage before and one after it
        assert 0 <= found.exposed_s <= found.wire_s * slack


def test_software_that_hides_everything_exposes_less() -> None:
    hiding = replace(default_stack(), tp_overlap=0.95, pp_overlap=0.95, dp_overlap=0.99, contention=0.0)
    shy = replace(default_stack(), tp_overlap=0.0, pp_overlap=0.0, dp_overlap=0.0)
    hidden, bare = (simulate_step(llama(), CLUSTER, WORK, config(), stack).exposed for stack in (hiding, shy))
    assert all(hidden[axis].exposed_s < bare[axis].exposed_s for axis in ("tp", "dp"))
    assert bare["tp"].exposed_s == pytest.approx(bare["tp"].wire_s, rel=0.15)


def test_a_longer_last_stage_paces_the_replay() -> None:
    even = simulate_step(llama(), CLUSTER, WORK, config()).step_s
    heavy = simulate_step(llama(vocab_size=256_000), CLUSTER, WORK, config()).step_s
    assert heavy > 1.05 * even


def test_a_timeline_of_a_million_actions_is_refused_with_a_batch_that_is_not() -> None:
    with pytest.raises(InputError, match=r"give --global-batch \d+ or less"):
        step(config(global_batch=2 * 10**6))
