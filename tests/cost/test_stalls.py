from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.cost.candidates import Candidates
from meshwright.cost.evaluate import estimate
from meshwright.cost.stack import Stack, StallRule, default_stack, stacks
from meshwright.cost.stalls import stalled_seconds
from meshwright.cost.workload import Workload
from meshwright.hardware.load import load
from meshwright.layout.config import HybridParallelConfig, Recompute
from meshwright.models.load import load as model_named

CLUSTER = load("h100-efa", nodes=16)
FREE = default_stack()
MODEL = model_named("llama-2-7b")


def stalls(config: HybridParallelConfig, rule: StallRule, memory_share: float = 0.5) -> float:
    """Seconds that a step stalls where each message waits one, under one rule."""
    return seconds(config, replace(FREE, message_stall_s=1.0, stall_rules=(rule,)), memory_share)


def seconds(config: HybridParallelConfig, stack: Stack, memory_share: float = 0.5) -> float:
    memory = np.array([memory_share * CLUSTER.accelerator.memory_bytes])
    return float(stalled_seconds(MODEL, Candidates.from_configs([config]), memory, CLUSTER, stack)[0])


@pytest.mark.parametrize(
    ("pp", "microbatches", "messages"), [(2, 1, 2), (2, 8, 16), (4, 1, 6), (4, 8, 34), (16, 32, 154)]
)
def test_messages_in_a_row_are_those_of_a_middle_stage_and_of_one_way_there_and_back(
    pp: int, microbatches: int, messages: int
) -> None:
    config = HybridParallelConfig(pp=pp, dp=2, global_batch=2 * microbatches)
    assert stalls(config, StallRule()) == messages


def test_a_rule_holds_where_all_of_it_does() -> None:
    config = HybridParallelConfig(pp=2, dp=8, tp=2, global_batch=128, zero=0)  # 32 GPUs, 16 microbatches
    met = StallRule(nodes=4, stages=2, tp=2, replicas=8, microbatches=16, zero=0, memory_share=0.4)
    assert stalls(config, met) == 32
    for unmet in (
        replace(met, nodes=5),
        replace(met, stages=3),
        replace(met, tp=3),
        replace(met, replicas=9),
        replace(met, microbatches=17),
        replace(met, memory_share=0.6),
    ):
        assert stalls(config, unmet) == 0
    assert stalls(replace(config, zero=1), met) == 0
    assert stalls(replace(config, zero=1), replace(met, zero=None)) == 32


def test_a_step_is_longer_by_its_stalls_and_by_nothing_where_a_stack_states_none() -> None:
    model, workload = MODEL, Workload(4096)
    config = HybridParallelConfig(pp=2, dp=8, tp=2, global_batch=128, zero=1)
    stopping = replace(FREE, message_stall_s=0.25, stall_rules=(StallRule(nodes=2),))
    free, stopped = (estimate(model, CLUSTER, workload, config, stack).time for stack in (FREE, stopping))
    assert stopped.step_s - free.step_s == pytest.approx(0.25 * 32)
    assert stopped.parts_s["host"] - free.parts_s["host"] == pytest.approx(0.25 * 32)
    assert [name for name, stack in stacks().items() if stack.stalls] == ["nanotron"]


def test_without_a_pipeline_ranks_of_a_group_wait_in_every_pass_of_a_layer() -> None:
    stack = replace(FREE, tp_wait_s=1.0, stall_rules=(StallRule(),))
    config = HybridParallelConfig(dp=4, tp=8, global_batch=12, zero=1)  # 3 microbatches of 32 layers
    assert seconds(config, stack) == 3 * 32 * 2 * 8
    assert seconds(replace(config, recompute=Recompute.FULL), stack) == 3 * 32 * 3 * 8
    assert seconds(replace(config, tp=1), stack) == 0
    assert seconds(config, replace(stack, stall_rules=(StallRule(nodes=5),))) == 0


def test_whole_gradients_go_round_the_replicas_bucket_by_bucket_where_a_job_stalls() -> None:
    stack = replace(FREE, bucket_bytes=4.0 * MODEL.parameters / 8, stall_rules=(StallRule(),))
    config = HybridParallelConfig(dp=4, tp=2, global_batch=4, zero=0)
    hops = 4 * 2 * 3  # an eighth of the model in a bucket, half of it on a rank: 4 buckets, 2 rounds over 3 neighbours
    assert seconds(config, stack) == pytest.approx(hops * CLUSTER.inter.latency_s)
    assert seconds(replace(config, zero=1), stack) == 0
    assert seconds(replace(config, dp=1, global_batch=1), stack) == 0


def test_without_a_pipeline_every_step_stalls_from_a_number_of_nodes_on() -> None:
    stack = replace(FREE, stall_s=2.0, stall_nodes=4)
    for dp, pp, expected in ((16, 1, 0.0), (32, 1, 2.0), (16, 2, 0.0)):
        assert seconds(HybridParallelConfig(dp=dp, pp=pp, global_batch=4 * dp), stack) == expected


def test_whole_gradients_may_hide_where_reduced_shards_do_not() -> None:
    model, workload = MODEL, Workload(4096)
    plain = replace(FREE, dp_overlap=0.0, gather_overlap=0.0, ddp_overlap=0.9)
    without = replace(plain, ddp_overlap=0.0)
    for zero, hides in ((0, True), (1, False)):
        config = HybridParallelConfig(dp=32, tp=4, global_batch=128, micro_batch=4, zero=zero)
        ours, bare = (estimate(model, CLUSTER, workload, config, stack).time.step_s for stack in (plain, without))
        assert (ours < 0.99 * bare) is hides
        assert ours <= bare
