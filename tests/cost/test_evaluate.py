"""Laws of the whole estimate: parts sum, one config equals its row in a batch, slower links never speed a step up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tools.calibrate.parameters import STACK_RANGES

from meshwright.cost.candidates import Candidates
from meshwright.cost.collectives import call_seconds
from meshwright.cost.device import network
from meshwright.cost.estimate import TIME_PARTS
from meshwright.cost.evaluate import estimate, evaluate, screen
from meshwright.cost.stack import default_stack, stack_for, stacks
from meshwright.cost.workload import Workload
from meshwright.hardware.load import load
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import ContextVariant, HybridParallelConfig, Recompute, Schedule
from meshwright.ledger import Collective
from meshwright.models.from_config import spec_from_config
from meshwright.models.spec import ModelSpec
from meshwright.planner.enumerate import space

WORKLOAD = Workload(4096)


def dense() -> ModelSpec:
    """Llama-3.1-8B's shape."""
    return spec_from_config(
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "vocab_size": 128256,
        }
    )


def sparse() -> ModelSpec:
    """Mixtral-8x7B's shape."""
    return spec_from_config(
        {
            "model_type": "mixtral",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "vocab_size": 32000,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        }
    )


DENSE, SPARSE = dense(), sparse()
CLUSTER = load("h100-sxm", nodes=8)


@st.composite
def configs(draw: st.DrawFn) -> HybridParallelConfig:
    """A legal split of 64 GPUs."""
    tp = draw(st.sampled_from([1, 2, 4, 8]))
    pp = draw(st.sampled_from([1, 2, 4, 8]))
    cp = draw(st.sampled_from([1, 2])) if tp * pp < 64 else 1
    dp = 64 // (tp * pp * cp)
    vpp = draw(st.sampled_from([1, 2])) if 1 < pp <= 8 else 1
    plain = [Schedule.ONE_F_ONE_B, Schedule.GPIPE, Schedule.ZB_H1] if pp > 1 else [Schedule.ONE_F_ONE_B]
    return HybridParallelConfig(
        dp=dp,
        tp=tp,
        pp=pp,
        cp=cp,
        vpp=vpp,
        sequence_parallel=tp > 1 and draw(st.booleans()),
        micro_batch=draw(st.sampled_from([1, 2])),
        global_batch=dp * draw(st.sampled_from([8, 16, 64])),
        schedule=Schedule.INTERLEAVED if vpp > 1 else draw(st.sampled_from(plain)),
        zero=draw(st.sampled_from([0, 1, 3] if pp == 1 else [0, 1])) if dp * cp > 1 else 0,
        recompute=draw(st.sampled_from(list(Recompute))),
        cp_variant=draw(st.sampled_from(list(ContextVariant))),
    )


@settings(max_examples=60, deadline=None)
@given(config=configs())
def test_parts_of_a_step_sum_to_the_step_and_none_is_negative(config: HybridParallelConfig) -> None:
    got = estimate(DENSE, CLUSTER, WORKLOAD, config)
    assert set(got.time.parts_s) == set(TIME_PARTS)
    assert all(seconds >= 0 for seconds in got.time.parts_s.values())
    assert got.time.step_s == pytest.approx(sum(got.time.parts_s.values()))
    assert 0 < got.throughput.mfu < 1


@settings(max_examples=60, deadline=None)
@given(config=configs())
def test_efficiency_factors_multiply_to_mfu(config: HybridParallelConfig) -> None:
    got = estimate(DENSE, CLUSTER, WORKLOAD, config)
    assert np.prod(list(got.efficiency.values())) == pytest.approx(got.throughput.mfu)
    assert all(0 < factor <= 1 for factor in got.efficiency.values())


@settings(max_examples=30, deadline=None)
@given(batch=st.lists(configs(), min_size=2, max_size=12))
def test_a_config_costs_the_same_alone_and_in_a_batch(batch: list[HybridParallelConfig]) -> None:
    together = evaluate(DENSE, CLUSTER, WORKLOAD, Candidates.from_configs(batch))
    for row, config in enumerate(batch):
        alone = estimate(DENSE, CLUSTER, WORKLOAD, config)
        assert together.step_s[row] == pytest.approx(alone.time.step_s, rel=1e-12)
        assert together.memory_bytes[row] == pytest.approx(alone.memory.peak.total_bytes, abs=100)
        assert together.mfu[row] == pytest.approx(alone.throughput.mfu)


def slowed(cluster: Cluster, link: str, factor: float) -> Cluster:
    """A cluster with one link's bandwidth divided."""
    found = getattr(cluster, link)
    return replace(cluster, **{link: replace(found, bandwidth=found.bandwidth / factor)})


@settings(max_examples=60, deadline=None)
@given(config=configs(), factor=st.floats(1.0, 30.0), link=st.sampled_from(["intra", "inter"]))
def test_time_never_falls_when_a_link_slows(config: HybridParallelConfig, factor: float, link: str) -> None:
    base = estimate(DENSE, CLUSTER, WORKLOAD, config).time.step_s
    slow = estimate(DENSE, slowed(CLUSTER, link, factor), WORKLOAD, config).time.step_s
    assert slow >= base * (1 - 1e-12)


@settings(max_examples=40, deadline=None)
@given(config=configs(), factor=st.floats(1.0, 30.0))
def test_time_never_falls_when_a_link_answers_later(config: HybridParallelConfig, factor: float) -> None:
    late = replace(CLUSTER, inter=replace(CLUSTER.inter, latency_s=CLUSTER.inter.latency_s * factor))
    base = estimate(DENSE, CLUSTER, WORKLOAD, config).time.step_s
    assert estimate(DENSE, late, WORKLOAD, config).time.step_s >= base * (1 - 1e-12)


def test_pruned_rows_have_infinite_time_and_the_others_are_unchanged() -> None:
    batch = [
        HybridParallelConfig(dp=64, global_batch=512),
        HybridParallelConfig(dp=8, tp=8, global_batch=512, zero=1, sequence_parallel=True),
    ]
    candidates = Candidates.from_configs(batch)
    model = replace(DENSE, pattern=DENSE.pattern * 3)
    whole = evaluate(model, CLUSTER, WORKLOAD, candidates)
    pruned = evaluate(model, CLUSTER, WORKLOAD, candidates, prune=True)
    assert whole.fits.tolist() == pruned.fits.tolist() == [False, True]
    assert np.isinf(pruned.step_s[0])
    assert pruned.step_s[1] == whole.step_s[1]


@pytest.mark.parametrize("framework", ["megatron-core", "nanotron"])
def test_a_screening_says_what_the_full_evaluation_says(framework: str) -> None:
    stack = stacks()[framework]
    model = replace(DENSE, pattern=DENSE.pattern * 3)
    _, candidates = next(space(model, CLUSTER, WORKLOAD.seq, CLUSTER.gpus, 512).chunks(3000))
    full = evaluate(model, CLUSTER, WORKLOAD, candidates, stack, prune=True)
    quick = screen(model, CLUSTER, WORKLOAD, candidates, stack)
    assert full.fits.any()
    assert not full.fits.all()
    assert np.array_equal(quick.fits, full.fits)
    assert np.array_equal(quick.memory_bytes, full.memory_bytes)
    assert np.allclose(quick.step_s, full.step_s, rtol=1e-14, atol=0.0)
    row = int(np.argmin(quick.step_s))
    alone = estimate(model, CLUSTER, WORKLOAD, candidates.config(row), stack)
    assert quick.step_s[row] == pytest.approx(alone.time.step_s, rel=1e-12)


def test_a_long_set_is_priced_in_chunks_like_a_short_one() -> None:
    config = HybridParallelConfig(dp=8, tp=8, global_batch=512, zero=1)
    many = evaluate(DENSE, CLUSTER, WORKLOAD, Candidates.from_configs([config]).take(np.zeros(70_000, dtype=np.int64)))
    assert len(many.step_s) == 70_000
    assert np.ptp(many.step_s) == 0.0


def test_expert_parallelism_trades_expert_traffic_for_memory() -> None:
    alone = HybridParallelConfig(dp=64, global_batch=512, zero=1)
    spread = replace(alone, ep=8)
    one, eight = (estimate(SPARSE, CLUSTER, WORKLOAD, c) for c in (alone, spread))
    assert one.time.parts_s["ep"] == 0.0 < eight.time.parts_s["ep"]
    assert eight.memory.peak.total_bytes < one.memory.peak.total_bytes


def test_a_stack_without_overlap_exposes_gradient_reduction() -> None:
    config = HybridParallelConfig(dp=64, global_batch=512, zero=1)
    eager = replace(default_stack(), dp_overlap=0.0, gather_overlap=0.0)
    hidden, bare = (estimate(DENSE, CLUSTER, WORKLOAD, config, s) for s in (default_stack(), eager))
    assert bare.time.parts_s["dp"] > hidden.time.parts_s["dp"]


def test_more_microbatches_shrink_the_bubble_share() -> None:
    config = HybridParallelConfig(dp=8, pp=8, global_batch=64)
    few, many = (estimate(DENSE, CLUSTER, WORKLOAD, replace(config, global_batch=b)) for b in (64, 1024))
    share = [e.time.parts_s["bubble"] / e.time.step_s for e in (few, many)]
    assert share[0] > 3 * share[1] > 0


def test_every_framework_of_the_measurements_has_its_stack() -> None:
    names = {
        "Megatron-Bridge (NeMo 25.09 container)": "megatron-bridge-2604",
        "Megatron-LM": "megatron-lm",
        "Megatron-DeepSpeed; ; schedule 1F1B;": "megatron-lm",
        "Megatron-DeepSpeed; ; schedule 1F1B (DeepSpeed);": "megatron-deepspeed",
        "Megatron-DeepSpeed; ; schedule ;": "megatron-deepspeed",
        "DeepSpeed ZeRO-3": "deepspeed-zero3",
        "llm-foundry (Composer FSDP)": "llm-foundry",
        "nanotron": "nanotron",
        "torchtitan": "torchtitan",
        "something unheard of": "generic",
    }
    assert {framework: stack_for(framework).name for framework in names} == names


def test_assumed_traits_of_a_stack_inherit_from_its_base() -> None:
    assumed = stacks(fitted=False)
    assert assumed["megatron-deepspeed"].dp_overlap == assumed["megatron-lm"].dp_overlap
    assert assumed["megatron-deepspeed"].sources == {}


def test_a_trait_that_is_stated_as_none_is_not_fitted() -> None:
    for name, stack in stacks(fitted=False).items():
        off = [f for f in STACK_RANGES if getattr(stack, f) == 0.0]
        assert all(getattr(stacks()[name], f) == 0.0 for f in off)


def test_a_variant_shares_all_traits_but_its_own() -> None:
    main, variant = stack_for("Megatron-Core"), stack_for("Megatron-LM; no grad-reduce/param-gather overlap")
    assert variant.variant_of == main.name
    assert variant.dp_overlap == 0.0
    assert variant.head_passes == main.head_passes


@pytest.mark.parametrize("model", [DENSE, SPARSE])
def test_an_exchange_of_heads_is_priced_call_by_call_and_hides_behind_nothing(model: ModelSpec) -> None:
    stack = replace(default_stack(), cp_overlap=0.8, ep_domain_copies=True, straggler=0.0)
    config = HybridParallelConfig(cp=16, dp=4, global_batch=16)  # over two nodes
    ring = estimate(model, CLUSTER, WORKLOAD, config, stack).time
    got = estimate(model, CLUSTER, WORKLOAD, replace(config, cp_variant=ContextVariant.ALL_TO_ALL), stack)

    def seconds(kv: bool) -> float:
        """Of one exchange: 4096 / 16 tokens, 32 query heads or 8 KV heads (repeated for 16 ranks), 128 wide, bf16."""
        nbytes = np.array([256.0 * (16 if kv else 32) * 128 * 2])
        return float(call_seconds(Collective.ALL_TO_ALL, CLUSTER, network(), np.array([16]), np.array([1]), nbytes)[0])

    layers_and_microbatches = 32 * 4
    assert ring.hidden_s["cp"] > 0
    assert got.time.hidden_s["cp"] == 0
    expected = layers_and_microbatches * 2 * (2 * seconds(kv=False) + 2 * seconds(kv=True))
    assert got.time.parts_s["cp"] == pytest.approx(expected, rel=1e-6)
