"""A microbatch's turn: how host and device share it, and what state costs the host that moves piece by piece."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright.cost.evaluate import estimate
from meshwright.cost.stack import Stack, default_stack
from meshwright.cost.workload import Workload
from meshwright.hardware.load import load
from meshwright.layout.config import HybridParallelConfig
from meshwright.models.load import load as model_named

CLUSTER = load("h100-efa", nodes=2)
MODEL = model_named("llama-2-7b")
PLAIN = replace(default_stack(), straggler=0.0, fsdp_overlap=0.0, contention=0.0)


def step_s(config: HybridParallelConfig, stack: Stack) -> float:
    return estimate(MODEL, CLUSTER, Workload(4096), config, stack).time.step_s


def test_waits_of_tensor_parallel_ranks_count_where_they_are_longer_than_the_device() -> None:
    config = HybridParallelConfig(tp=8, pp=2, global_batch=8, sequence_parallel=True)
    free, short, long, longer = (step_s(config, replace(PLAIN, tp_wait_s=w)) for w in (0.0, 1e-9, 0.1, 0.2))
    assert short == free
    turn = 16 * 2 * 8 * 0.1  # a stage's layers, forward and backward, of a group
    assert longer - long == pytest.approx((8 + 1) * turn), "eight microbatches, and one to fill the pipeline"
    inside = HybridParallelConfig(dp=2, tp=8, global_batch=8, sequence_parallel=True)
    assert step_s(inside, replace(PLAIN, tp_wait_s=0.1)) == step_s(inside, PLAIN), "no pipeline leaves the node"


@pytest.mark.parametrize("messages", [1, 12])
def test_sharded_state_costs_the_host_every_ranks_piece_of_every_message(messages: int) -> None:
    stack = replace(PLAIN, shard_messages=messages)
    for zero, calls in ((1, 0), (3, 3 * (32 + 1))):  # gathered twice, reduced once: 32 layers and the ends
        config = HybridParallelConfig(dp=16, zero=zero, global_batch=32)
        more = step_s(config, replace(stack, piece_copy_s=1e-4)) - step_s(config, stack)
        assert more == pytest.approx(2 * calls * messages * 16 * 1e-4)
