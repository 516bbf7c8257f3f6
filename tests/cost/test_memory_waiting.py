"""Memory beside state and microbatches in flight: waiting buffers, the optimizer's step, DDP's buckets."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tests.cost.shapes import decoder

from meshwright.cost.candidates import Candidates, Chunk, unit_keys
from meshwright.cost.memory import MemoryArrays, training_memory
from meshwright.cost.memory_peak import peak_memory
from meshwright.cost.stack import Stack, StallRule
from meshwright.cost.stages import stages
from meshwright.cost.workload import Workload
from meshwright.hardware.load import load, resize
from meshwright.layout.config import HybridParallelConfig
from meshwright.ledger import MemoryKind
from meshwright.models.spec import ModelSpec
from meshwright.validation.layer_split import split_by_cost

CLUSTER = resize(load("h100-sxm"), gpus=256)
WORK = Workload(seq=1024)
MODEL = decoder(layers=16, hidden=256, heads=16)
MESSAGE = 2 * 1024 * 256


def memory(stack: Stack, *configs: HybridParallelConfig, model: ModelSpec = MODEL) -> MemoryArrays:
    candidates = Candidates.from_configs(configs)
    keys = unit_keys(candidates)
    found = training_memory(model, CLUSTER, WORK, candidates, stages(model, candidates), keys, stack)
    peak, _ = peak_memory(model, CLUSTER, WORK, Chunk.of(candidates), stack)
    assert np.allclose(peak, found.peak_bytes, rtol=1e-12)
    return found


def test_waiting_buffers_are_bounded_by_the_queue_and_by_the_warm_up_that_was_not_taken_over() -> None:
    plain = Stack(allocator_slack=0.0)
    waits = dataclasses.replace(plain, pending_messages=45.0)
    shapes = [(1, 1), (4, 1), (4, 2), (4, 4), (4, 8), (4, 16)]
    configs = [HybridParallelConfig(dp=2, tp=tp, pp=pp, sequence_parallel=tp > 1, global_batch=64) for tp, pp in shapes]
    more = memory(waits, *configs).total[:, 0] - memory(plain, *configs).total[:, 0]
    # two messages a layer of the microbatches beyond two: 4 layers x 2 x 2 at pp 4, 2 x 2 x 6 at pp 8, 1 x 2 x 14
    assert (more / MESSAGE).tolist() == pytest.approx([0, 45, 0, 16, 24, 28])


def test_nothing_waits_where_a_job_stalls() -> None:
    rules = (StallRule(nodes=32), StallRule(memory_share=1e-6))  # memory is what is asked for: no rule here
    plain = Stack(allocator_slack=0.0, stall_rules=rules)
    waits = dataclasses.replace(plain, pending_messages=45.0)
    many = HybridParallelConfig(dp=16, tp=4, pp=4, sequence_parallel=True, global_batch=64)
    few = dataclasses.replace(many, dp=8)
    more = memory(waits, many, few).total - memory(plain, many, few).total
    assert not more[0].any()
    assert more[1, 0] == pytest.approx(16 * MESSAGE)


def test_waiting_buffers_never_decide_whether_a_job_fits() -> None:
    plain = Stack(allocator_slack=0.0)
    config = HybridParallelConfig(dp=2, tp=4, sequence_parallel=True, global_batch=64)
    flood = dataclasses.replace(plain, pending_messages=1e9)
    assert memory(flood, config).peak_bytes == memory(plain, config).peak_bytes


def test_ddp_keeps_buckets_only_where_there_are_replicas() -> None:
    stack = Stack(bucket_gradients=2.0)
    configs = [HybridParallelConfig(dp=dp, global_batch=4) for dp in (1, 2)]
    gradients = memory(stack, *configs).by_kind[MemoryKind.GRADIENTS][:, 0]
    assert (gradients / MODEL.parameters).tolist() == [4, 6]


def test_the_optimizers_step_counts_where_it_exceeds_the_microbatches_in_flight() -> None:
    plain = Stack(allocator_slack=0.0)
    steps = dataclasses.replace(plain, step_bytes=14.0)
    wide = decoder(layers=2, hidden=1024, heads=8, vocab=64000)
    configs = [HybridParallelConfig(dp=4, zero=z, global_batch=4) for z in (0, 1)]
    before = memory(plain, *configs, model=wide)
    kinds = (MemoryKind.ACTIVATIONS, MemoryKind.LOGITS, MemoryKind.BUFFERS, MemoryKind.TEMPORARIES)
    flight = sum(before.by_kind[kind][:, 0] for kind in kinds)
    step = 14.0 * wide.parameters * np.array([1, 1 / 4])
    more = memory(steps, *configs, model=wide).total[:, 0] - before.total[:, 0]
    assert more == pytest.approx(np.maximum(step - flight, 0.0))
    assert np.sign(step - flight).tolist() == [1, -1], "the case shows both"


def test_a_stage_that_reaches_its_share_exactly_takes_no_further_block() -> None:
    weight = 4 * 64 * 64 + 3 * 64 * 128  # one layer's products
    model = decoder(layers=16, hidden=64, heads=4, width=128, gated=True, vocab=4 * weight // 64, tied=True)
    assert split_by_cost(model, 2) == (10, 6)
    assert split_by_cost(model, 4) == (5, 5, 5, 1)
