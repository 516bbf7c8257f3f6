"""Training memory against Korthikanti's published values, against hand counts, and its laws."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cost.shapes import decoder

from meshwright.cost.candidates import Candidates, unit_keys
from meshwright.cost.layers import layer_memory
from meshwright.cost.memory import MemoryArrays, training_memory
from meshwright.cost.stack import Stack
from meshwright.cost.stages import stages
from meshwright.cost.workload import Optimizer, Workload
from meshwright.hardware.spec import Accelerator, Cluster, Link
from meshwright.layout.config import HybridParallelConfig, Precision, Recompute, Schedule
from meshwright.ledger import MemoryKind
from meshwright.models.spec import ModelSpec

GIB = 2**30
LINK = Link("link", 1e11, 1e-6)
CLUSTER = Cluster(
    "c", Accelerator("gpu", 80 * GIB, 1e12, {"bf16": 1e15}, 100, "x"), 64, 8, 8, LINK, LINK, reserved_bytes=GIB
)


def memory(
    model: ModelSpec, *configs: HybridParallelConfig, workload: Workload | None = None, stack: Stack | None = None
) -> MemoryArrays:
    candidates = Candidates.from_configs(configs)
    work = workload or Workload(seq=2048)
    return training_memory(model, CLUSTER, work, candidates, stages(model, candidates), unit_keys(candidates), stack)


# (hidden, heads, layers, tp, pp, vpp, micro batch): table 3 of Korthikanti et al. 2022; expected GiB: figures 1 and 7
KORTHIKANTI = {
    "22B": (6144, 64, 48, 8, 1, 1, 4, 45.5625, 59.25, 9.5625),
    "175B": (12288, 96, 96, 8, 8, 3, 1, 45.5625, 66.84, 12.35),
    "530B": (20480, 128, 105, 8, 35, 3, 1, 31.64, 114.02, 23.08),
    "1T": (25600, 160, 128, 8, 64, 1, 1, 32.96, 131.25, 26.56),
}


@pytest.mark.parametrize("name", KORTHIKANTI)
def test_layer_memory_equals_korthikantis_figures(name: str) -> None:
    hidden, heads, layers, tp, pp, vpp, micro_batch, state_gib, none_gib, selective_gib = KORTHIKANTI[name]
    model = decoder(layers, hidden, heads, width=4 * hidden, vocab=51200)
    work = Workload(seq=2048, flash_attention=False, dropout=True)
    schedule = Schedule.INTERLEAVED if vpp > 1 else Schedule.ONE_F_ONE_B
    base = HybridParallelConfig(
        tp=tp, pp=pp, vpp=vpp, micro_batch=micro_batch, global_batch=micro_batch * pp * 8, schedule=schedule
    )
    selective = dataclasses.replace(base, sequence_parallel=True, recompute=Recompute.SELECTIVE)
    found = memory(model, base, selective, workload=work, stack=Stack())
    ends = 2048 * micro_batch * hidden  # the figures leave out the embedding's dropout mask and the final norm
    live = pp + (pp - 1) / vpp if vpp > 1 else pp
    on_last = 4 * ends * (pp == 1)
    activations = (
        found.by_kind[MemoryKind.ACTIVATIONS][:, 0]
        - ends * live * np.array([1, 1 / tp])
        - on_last * np.array([1, 1 / tp])
    )
    assert activations / GIB == pytest.approx([none_gib, selective_gib], rel=1e-3)
    keys = unit_keys(Candidates.from_configs([base])).candidates
    per_layer = layer_memory(model, work, keys, Stack()).dense_parameters[0, 0] - 2 * hidden
    assert 18 * per_layer * layers / pp / GIB == pytest.approx(state_gib, rel=1e-3)


def test_states_of_zero_stages_equal_the_hand_count() -> None:
    model = decoder(layers=4, tied=False)
    configs = [HybridParallelConfig(dp=8, zero=z, global_batch=8) for z in range(4)]
    found = memory(model, *configs, stack=Stack()).by_kind
    n = model.parameters
    assert found[MemoryKind.PARAMETERS][:, 0].tolist() == [2 * n, 2 * n, 2 * n, 4 * n / 8]
    assert found[MemoryKind.GRADIENTS][:, 0].tolist() == [4 * n, 4 * n, 4 * n / 8, 4 * n / 8]
    assert found[MemoryKind.OPTIMIZER][:, 0].tolist() == [12 * n, 12 * n / 8, 12 * n / 8, 8 * n / 8]


@pytest.mark.parametrize(
    ("optimizer", "precision", "expected"),
    [
        (Optimizer.ADAM_FP32, Precision.FP32, 4 + 8),
        (Optimizer.ADAM_MIXED, Precision.BF16, 2 + 12),
        (Optimizer.ADAM_BF16, Precision.BF16, 2 + 4),
        (Optimizer.ADAM_8BIT, Precision.BF16, 2 + 2.00390625),
        (Optimizer.SGD, Precision.FP32, 4),
    ],
)
def test_optimizers_take_their_bytes_per_parameter(optimizer: Optimizer, precision: Precision, expected: float) -> None:
    model = decoder()
    config = HybridParallelConfig(precision=precision, global_batch=1)
    found = memory(model, config, workload=Workload(seq=64, optimizer=optimizer)).by_kind
    state = found[MemoryKind.PARAMETERS] + found[MemoryKind.OPTIMIZER]
    assert state[0, 0] == pytest.approx(expected * model.parameters)


def test_hsdp_shards_state_over_the_shard_group_only() -> None:
    model = decoder()
    full, hybrid = memory(
        model,
        HybridParallelConfig(dp=16, zero=3, global_batch=16),
        HybridParallelConfig(dp=16, zero=3, zero_shards=4, global_batch=16),
    ).by_kind[MemoryKind.OPTIMIZER][:, 0]
    assert hybrid == pytest.approx(4 * full)


def test_expert_state_is_sharded_over_its_own_replicas() -> None:
    model = decoder(moe_from=0)
    config = HybridParallelConfig(dp=8, ep=4, zero=1, global_batch=8)
    found = memory(model, config, stack=Stack()).by_kind[MemoryKind.OPTIMIZER][0, 0]
    routed = sum(t.size for t in model.kinds[1].tensors if t.experts) * model.num_layers
    assert found == pytest.approx(12 * ((model.parameters - routed) / 8 + routed / 4 / 2))


def test_a_tied_embedding_is_held_again_by_the_last_stage() -> None:
    model = decoder(layers=4)
    found = memory(model, HybridParallelConfig(pp=2, global_batch=2)).by_kind[MemoryKind.PARAMETERS][0]
    layers = 2 * sum(t.size for t in model.kinds[0].tensors)
    table = model.vocab * model.hidden
    assert found.tolist() == [2 * (layers + table), 2 * (layers + table + model.hidden)]


def test_full_recompute_keeps_only_layer_inputs_and_every_second_layer_half_of_them() -> None:
    model = decoder(layers=8)
    none, half, full = (
        HybridParallelConfig(recompute=mode, recompute_every=every, global_batch=1)
        for mode, every in ((Recompute.NONE, 1), (Recompute.FULL, 2), (Recompute.FULL, 1))
    )
    found = memory(model, none, half, full).by_kind[MemoryKind.ACTIVATIONS][:, 0]
    assert found[1] == pytest.approx((found[0] + found[2]) / 2)
    final = 4 * 2048 * model.hidden
    assert found[2] == pytest.approx(8 * 2 * 2048 * model.hidden + final)


def test_kv_heads_fewer_than_tp_are_held_by_every_rank() -> None:
    grouped = decoder(hidden=256, heads=16, kv_heads=2)
    keys = Candidates.from_configs([HybridParallelConfig(tp=t, dp=8 // t, global_batch=8) for t in (2, 8)])
    per_rank = layer_memory(grouped, Workload(seq=64), keys, Stack()).dense_parameters[:, 0]
    head = 256 // 16 * 256
    expected = [(2 * 16 / t * head) + 2 * 1 * head + 2 * 256 * 256 / t + 2 * 256 for t in (2, 8)]
    assert per_rank.tolist() == pytest.approx(expected)


small = st.sampled_from([1, 2, 4, 8])


@st.composite
def pairs(draw: st.DrawFn) -> HybridParallelConfig:
    tp = draw(small)
    return HybridParallelConfig(
        dp=draw(small),
        tp=tp,
        pp=draw(st.sampled_from([1, 2, 4])),
        sequence_parallel=draw(st.booleans()),
        micro_batch=draw(st.sampled_from([1, 2])),
        global_batch=256,
        schedule=draw(st.sampled_from([Schedule.ONE_F_ONE_B, Schedule.GPIPE, Schedule.ZB_H1])),
        zero=draw(st.integers(0, 3)),
        recompute=draw(st.sampled_from(list(Recompute))),
    )


@settings(max_examples=60)
@given(pairs(), st.booleans())
def test_memory_never_grows_with_tp_or_zero(config: HybridParallelConfig, moe: bool) -> None:
    model = decoder(hidden=512, heads=16, kv_heads=16, width=2048, gated=True, moe_from=2 if moe else None)
    more_tp = dataclasses.replace(config, tp=2 * config.tp)
    base, wider = memory(model, config, more_tp).total
    assert (wider <= base + 1e-6).all()
    if config.zero < 2:
        sharded = memory(model, dataclasses.replace(config, zero=config.zero + 1)).total[0]
        assert (sharded <= base + 1e-6).all()


@settings(max_examples=50)
@given(pairs())
def test_the_peak_is_the_fullest_stage(config: HybridParallelConfig) -> None:
    model = decoder(layers=12, tied=False)
    candidates = Candidates.from_configs([config])
    found = memory(model, config)
    roles = stages(model, candidates)
    assert found.peak_bytes[0] == found.total[0].max()
    assert found.peak_stage[0] in roles.index[0]
    assert sum(v[0, 0] for v in found.by_kind.values()) == pytest.approx(found.total[0, 0])


def test_rows_of_many_candidates_equal_one_at_a_time() -> None:
    model = decoder(layers=12, moe_from=3)
    configs = [
        HybridParallelConfig(dp=8 // tp, tp=tp, pp=pp, zero=zero, ep=ep, global_batch=64, recompute=mode)
        for tp in (1, 2)
        for pp in (1, 2, 3, 4)
        for zero in (0, 1, 3)
        for ep in (1, 4)
        for mode in Recompute
    ]
    together = memory(model, *configs)
    alone = [memory(model, c).peak_bytes[0] for c in configs]
    assert together.peak_bytes == pytest.approx(alone)


def test_a_loss_over_gathered_logits_does_not_shrink_with_tp() -> None:
    model = decoder(tied=False)
    split, gathered = (
        memory(model, HybridParallelConfig(tp=4, global_batch=1), stack=Stack(vocab_parallel_loss=own)).by_kind
        for own in (True, False)
    )
    whole = 2048 * model.vocab * Stack().logit_bytes
    assert split[MemoryKind.LOGITS][0, 0] == whole / 4
    assert gathered[MemoryKind.LOGITS][0, 0] == whole


def test_logits_of_the_previous_microbatch_count_only_where_there_is_one() -> None:
    model = decoder()
    stack = Stack(logit_carry_bytes=4.0)
    one, two = (
        memory(model, HybridParallelConfig(global_batch=b), stack=stack).by_kind[MemoryKind.LOGITS][0, 0]
        for b in (1, 2)
    )
    assert two - one == 4 * 2048 * model.vocab


def test_gpipe_holds_the_logits_of_every_microbatch() -> None:
    model = decoder()
    configs = [HybridParallelConfig(global_batch=4, schedule=s) for s in (Schedule.ONE_F_ONE_B, Schedule.GPIPE)]
    plain, waiting = memory(model, *configs, stack=Stack()).by_kind[MemoryKind.LOGITS][:, 0]
    assert waiting - plain == 3 * Stack().logit_kept_bytes * 2048 * model.vocab


def test_reserved_memory_is_the_clusters_and_the_allocators_slack() -> None:
    found = memory(decoder(), HybridParallelConfig(global_batch=1), stack=Stack(allocator_slack=0.1))
    assert found.by_kind[MemoryKind.RESERVED][0, 0] == pytest.approx(GIB + 0.1 * found.allocated[0, 0])


def test_traits_of_a_stack_add_what_they_say_per_layer() -> None:
    model = decoder(gated=True, hidden=64, heads=4, width=256)
    base = HybridParallelConfig(tp=2, sequence_parallel=True, global_batch=1)
    token = 2048 * model.num_layers

    def kept(stack: Stack) -> float:
        return memory(model, base, stack=stack).by_kind[MemoryKind.ACTIVATIONS][0, 0]

    plain = kept(Stack())
    assert kept(Stack(fused_glu=False)) - plain == token * 2 * 256 / 2
    assert kept(Stack(attention_copies=3.0)) - plain == token * 3 * 2 * 64 / 2
    assert kept(Stack(regathers_input=False)) - plain == (token * 2 * 2 + 2048 * 2) * 64 / 2
    assert kept(Stack(fused_norm=False)) - plain == (token * 2 + 2048) * 4 * 64 / 2


def test_experts_keep_their_routed_copies_and_capacity_bounds_them() -> None:
    model = decoder(moe_from=0, experts=8, top_k=2, expert_width=64)
    config = HybridParallelConfig(dp=4, ep=4, global_batch=4)

    def kept(capacity: float | None) -> float:
        work = Workload(seq=2048, capacity_factor=capacity)
        return memory(model, config, workload=work, stack=Stack()).by_kind[MemoryKind.ACTIVATIONS][0, 0]

    copies = 2 * 2048
    per_copy = (2 * 64 + 2 * 64) + (2 * 2 + 2) * 64  # permuted input, expert output; gate, up and their product
    assert kept(1.0) - kept(0.5) == model.num_layers * copies / 2 * per_copy
    assert kept(None) == kept(1.0)
