"""Serving against hand counts, published latencies, and its laws."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cost.shapes import decoder

from meshwright.cost.candidates import Candidates
from meshwright.cost.kv_cache import layer_cache_bytes, sequence_cache_bytes
from meshwright.cost.serving import serve_arrays, serve_estimate
from meshwright.cost.serving_pass import rank_imbalance
from meshwright.cost.serving_stack import ServingStack, serving_bases, serving_stack_for, serving_stacks
from meshwright.cost.stages import stages
from meshwright.cost.workload import ServingWorkload
from meshwright.hardware.spec import Accelerator, Cluster, Link
from meshwright.layout.config import HybridParallelConfig, Precision
from meshwright.models.spec import Attention, LayerKind, LinearMixer, ModelSpec

GIB = 2**30
# NVIDIA A100 80GB SXM data sheet: 312 TFLOP/s dense fp16, 2,039 GB/s, NVLink 300 GB/s each way; HDR 200 Gb/s NIC
A100 = Accelerator("a100", 80 * 10**9, 2.039e12, {"bf16": 312e12, "fp16": 312e12}, 108, "ampere")
DGX_A100 = Cluster(
    "dgx-a100", A100, 4, 8, 8, Link("nvlink", 3e11, 1e-6), Link("hdr", 2.5e10, 5e-6), reserved_bytes=2 * GIB
)


def llama_8b() -> ModelSpec:
    return decoder(32, 4096, 32, 8, 14336, 128256, gated=True, tied=False)


def config(tp: int = 1, pp: int = 1, dp: int = 1, ep: int = 1) -> HybridParallelConfig:
    return HybridParallelConfig(tp=tp, pp=pp, dp=dp, ep=ep, global_batch=dp, precision=Precision.FP16)


def test_a_sequences_cache_counts_every_layer_and_whole_blocks() -> None:
    model = llama_8b()
    candidates = Candidates.from_configs([config(), config(tp=2), config(tp=16), config(pp=4)])
    tokens = np.full(4, 1001.0)
    found = sequence_cache_bytes(model, stages(model, candidates), candidates.tp, tokens, 2.0).max(axis=1)
    blocks = 63 * 16  # 1001 tokens
    per_token_and_layer = 2 * 8 * 128 * 2
    whole = blocks * per_token_and_layer * 32
    assert found.tolist() == [whole, whole / 2, whole / 8, whole / 4]  # never less than one KV head on a rank


def test_mla_caches_its_latent_whole_on_every_rank_and_windows_bound_the_cache() -> None:
    kind = llama_8b().kinds[0]

    def cache(mixer: Attention | LinearMixer, tp: int, tokens: float) -> float:
        layer: LayerKind = dataclasses.replace(kind, mixer=mixer)
        return float(layer_cache_bytes(layer, np.array([tokens]), np.array([tp]), 2.0)[0])

    latent = Attention(128, 128, 192, 128, 576, kv_replicated=True)
    assert cache(latent, 8, 1600) == cache(latent, 1, 1600) == 1600 * 576 * 2
    sliding = Attention(32, 8, 128, 128, 2048, window=1024)
    assert cache(sliding, 1, 10_000) == 1024 * 2048 * 2
    compressed = Attention(32, 8, 128, 128, 2048, window=128, kv_compression=4)
    assert cache(compressed, 1, 12_800) == (128 + 3200) * 2048 * 2
    state = LinearMixer("gated delta net", 32, 128, 128, 64, 8192, 4, 4)
    assert cache(state, 1, 100) == cache(state, 1, 100_000) == 32 * 128 * 128 * 4 + 8192 * 4 * 2


def test_sequences_fill_what_the_weights_leave() -> None:
    model = llama_8b()
    found = serve_estimate(model, DGX_A100, ServingWorkload(1024, 256), config())
    assert found.weights_bytes == pytest.approx(2 * model.parameters)
    free = DGX_A100.usable_bytes - found.weights_bytes - found.workspace_bytes
    share = serving_stacks()["vllm"].cache_share
    assert found.max_sequences == int(free * share // (1280 * 2 * 8 * 128 * 2 * 32))
    assert found.fits


def test_a_model_larger_than_the_device_does_not_fit() -> None:
    big = decoder(80, 8192, 64, 8, 28672, 128256, gated=True, tied=False)
    assert not serve_estimate(big, DGX_A100, ServingWorkload(1024, 256), config()).fits
    assert serve_estimate(big, DGX_A100, ServingWorkload(1024, 256), config(tp=4)).fits


def test_decoding_one_sequence_is_bound_by_reading_the_weights() -> None:
    model = llama_8b()
    one = serve_estimate(model, DGX_A100, ServingWorkload(16, 64), config(), batch=1)
    roofline = (model.parameters - model.vocab * model.hidden) * 2 / A100.memory_bandwidth
    assert roofline < one.tpot_s < 2 * roofline


# (tp, prompt, output, batch, milliseconds): FasterTransformer docs/gpt_guide.md, GPT-20B, fp16, DGX A100-80GB
PUBLISHED = [
    (1, 20, 8, 32, 331.0),
    (1, 60, 20, 128, 2218.0),
    (2, 200, 200, 16, 4672.0),
    (4, 60, 20, 16, 345.0),
    (8, 80, 200, 64, 3173.0),
    (8, 200, 200, 8, 2338.0),
]


@pytest.mark.parametrize(("tp", "prompt", "output", "batch", "latency_ms"), PUBLISHED)
def test_static_batches_take_about_their_published_latency(
    tp: int, prompt: int, output: int, batch: int, latency_ms: float
) -> None:
    model = decoder(44, 6144, 48, width=24576, vocab=51200)
    stack = serving_stack_for("FasterTransformer")
    found = serve_estimate(model, DGX_A100, ServingWorkload(prompt, output), config(tp=tp), batch, stack)
    assert found.latency_s * 1e3 == pytest.approx(latency_ms, rel=0.2)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2]), st.integers(1, 64), st.booleans())
def test_bigger_batches_take_longer_and_slower_links_never_help(tp: int, pp: int, batch: int, moe: bool) -> None:
    model = decoder(8, 2048, 16, 8, 8192, 32000, gated=True, moe_from=2 if moe else None, expert_width=1024)
    work = ServingWorkload(256, 128)
    one = serve_estimate(model, DGX_A100, work, config(tp=tp, pp=pp), batch)
    two = serve_estimate(model, DGX_A100, work, config(tp=tp, pp=pp), 2 * batch)
    assert two.latency_s >= one.latency_s
    assert two.tokens_per_s >= one.tokens_per_s * 0.999
    slow = dataclasses.replace(DGX_A100, intra=Link("slow", 1e9, 1e-6))
    slowed = serve_estimate(model, slow, work, config(tp=tp, pp=pp), batch)
    assert slowed.latency_s >= one.latency_s
    assert slowed.tokens_per_s <= one.tokens_per_s


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=15, deadline=None)
def test_longer_requests_never_leave_room_for_more(prompt: int, output: int, tp: int) -> None:
    model = llama_8b()
    short = serve_estimate(model, DGX_A100, ServingWorkload(prompt, output), config(tp=tp))
    long = serve_estimate(model, DGX_A100, ServingWorkload(2 * prompt, output), config(tp=tp))
    assert long.max_sequences <= short.max_sequences


def test_a_target_for_the_time_per_token_limits_the_batch() -> None:
    model = llama_8b()
    free = serve_estimate(model, DGX_A100, ServingWorkload(512, 512), config())
    target = free.tpot_s / 3
    bound = serve_estimate(model, DGX_A100, ServingWorkload(512, 512, tpot_s=target), config())
    assert bound.sequences < free.sequences
    assert bound.tpot_s <= target
    assert bound.meets_targets
    more = serve_estimate(model, DGX_A100, ServingWorkload(512, 512), config(), batch=bound.sequences + 2)
    assert more.tpot_s > target


def test_no_more_requests_run_at_once_than_there_are() -> None:
    few = serve_estimate(llama_8b(), DGX_A100, ServingWorkload(512, 512, requests=40), config(dp=4))
    assert few.sequences == 10
    share = serving_stacks()["vllm"].occupancy
    assert few.tokens_per_s == pytest.approx(4 * 10 / few.tpot_s * share)  # one wave


@given(waves=st.integers(1, 40), rest=st.floats(0.02, 0.5), pp=st.sampled_from([1, 2]))
@settings(max_examples=25, deadline=None)
def test_a_run_that_ends_is_slower_by_its_last_wave_alone(waves: int, rest: float, pp: int) -> None:
    model, endless = llama_8b(), ServingWorkload(512, 512)
    forever = serve_estimate(model, DGX_A100, endless, config(pp=pp))
    whole = dataclasses.replace(endless, requests=waves * forever.sequences)
    assert serve_estimate(model, DGX_A100, whole, config(pp=pp)).tokens_per_s == pytest.approx(forever.tokens_per_s)
    left = max(1, round(rest * forever.sequences))
    ragged = dataclasses.replace(endless, requests=waves * forever.sequences + left)
    found = serve_estimate(model, DGX_A100, ragged, config(pp=pp)).tokens_per_s
    last = serve_estimate(model, DGX_A100, endless, config(pp=pp), batch=left)
    seconds = waves * forever.tpot_s + last.tpot_s
    share = serving_stacks()["vllm"].occupancy
    assert found == pytest.approx((waves * forever.sequences + left) / seconds * share)
    assert found < 1.01 * forever.tokens_per_s, "380 sequences are 0.8 % faster than 900, by the rounding of tiles"


def test_weights_that_the_kernel_dequantises_run_at_the_engines_share_of_others() -> None:
    """Products of 16 bits over 4-bit weights take 1 / `upcast` as long; weights of 16 bits are not touched."""
    stack = serving_stacks()["vllm"]

    def tpot(upcast: float, weight_bytes: float | None) -> float:
        there = dataclasses.replace(stack, upcast=upcast)
        asked = ServingWorkload(16, 64)
        return serve_estimate(llama_8b(), DGX_A100, asked, config(), 1, there, weight_bytes).tpot_s

    assert tpot(0.5, None) == tpot(1.0, None)
    streamed = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336) * 0.53125
    assert tpot(0.5, 0.53125) - tpot(1.0, 0.53125) == pytest.approx(
        streamed / (A100.memory_bandwidth * 0.8 * stack.stream), rel=0.05
    )


def test_moving_tokens_to_experts_costs_by_copies_and_dense_layers_move_none() -> None:
    def seconds(passes: float, top_k: int | None) -> float:
        there = dataclasses.replace(serving_stacks()["vllm"], permute_passes=passes)
        experts = {} if top_k is None else {"moe_from": 0, "experts": 64, "top_k": top_k, "expert_width": 64}
        model = decoder(16, 4096, 32, 8, 8192, 32000, gated=True, **experts)  # pyright: ignore[reportArgumentType]
        return serve_estimate(model, DGX_A100, ServingWorkload(64, 64), config(), 64, there).tpot_s

    assert seconds(3.0, None) == seconds(1.0, None)
    per_copy = seconds(3.0, 2) - seconds(1.0, 2)
    assert per_copy > 0
    assert seconds(3.0, 8) - seconds(1.0, 8) == pytest.approx(4 * per_copy)


def test_a_release_has_its_own_fitted_traits_over_those_of_the_release_before() -> None:
    older, newer = serving_stacks()["tensorrt-llm-pytorch"], serving_stacks()["tensorrt-llm-1-2"]
    assert serving_bases()["tensorrt-llm-1-2"] == older.name
    assert (newer.max_sequences, newer.host_overlap) == (older.max_sequences, older.host_overlap)
    assert newer.gemm != older.gemm
    assert "rows" in newer.sources["gemm"]
    assert serving_stacks(fitted=False)["tensorrt-llm-1-2"].gemm == ServingStack().gemm
    unfitted = serving_stacks()["vllm"]  # no rows: as the release it is based on
    assert unfitted.gemm == serving_stacks()["tensorrt-llm"].gemm


def test_replicas_multiply_throughput_and_share_experts_over_ep() -> None:
    dense = llama_8b()
    work = ServingWorkload(512, 128)
    one, four = (serve_estimate(dense, DGX_A100, work, config(dp=dp)) for dp in (1, 4))
    assert four.tokens_per_s == pytest.approx(4 * one.tokens_per_s)
    sparse = decoder(16, 2048, 16, 8, 8192, 32000, gated=True, moe_from=0, experts=64, expert_width=1024)
    alone, shared = (serve_estimate(sparse, DGX_A100, work, config(dp=4, ep=ep)) for ep in (1, 4))
    assert shared.weights_bytes < alone.weights_bytes
    assert shared.max_sequences > alone.max_sequences


def test_rows_of_many_candidates_equal_one_at_a_time() -> None:
    model = decoder(8, 2048, 16, 8, 8192, 32000, gated=True, moe_from=2, expert_width=1024)
    work = ServingWorkload(700, 90, kv_bytes_per_element=1.0)
    many = [config(tp, pp, dp, ep) for tp in (1, 2, 8) for pp in (1, 2) for dp, ep in ((1, 1), (4, 1), (4, 4))]
    arrays = serve_arrays(model, DGX_A100, work, Candidates.from_configs(many))
    for row, each in enumerate(many):
        alone = serve_estimate(model, DGX_A100, work, each)
        assert arrays.tokens_per_s[row] == pytest.approx(alone.tokens_per_s)
        assert arrays.ttft_s[row] == pytest.approx(alone.ttft_s)
        assert arrays.latency_s[row] == pytest.approx(alone.latency_s)


@given(busiest=st.floats(1, 50), experts=st.sampled_from([8, 64, 128, 256]), ep=st.sampled_from([1, 2, 4, 8]))
def test_the_busiest_rank_is_less_uneven_the_more_experts_it_holds(busiest: float, experts: int, ep: int) -> None:
    def of(sizes: int, ranks: int) -> float:
        return float(rank_imbalance(busiest, sizes, np.array([float(ranks)]))[0])

    assert of(experts, 1) == 1.0
    assert 1.0 <= of(experts, ep) <= min(ep, busiest)
    assert of(2 * experts, ep) <= of(experts, ep)
    assert of(experts, ep) <= of(experts, 2 * ep)


def test_a_node_gets_a_token_once_however_many_of_its_experts_were_chosen() -> None:
    """Over the network the messages of eight experts on two nodes are two, not eight (DeepSeek-AI 2024, 3.2.2)."""

    def decode_s(top_k: int) -> float:
        model = decoder(16, 4096, 32, 8, 8192, 32000, gated=True, moe_from=0, experts=64, top_k=top_k, expert_width=64)
        across = serve_estimate(model, DGX_A100, ServingWorkload(64, 64), config(dp=16, ep=16), batch=64)
        inside = serve_estimate(model, DGX_A100, ServingWorkload(64, 64), config(dp=8, ep=8), batch=64)
        return across.tpot_s - inside.tpot_s

    assert decode_s(8) < 2 * decode_s(2)
