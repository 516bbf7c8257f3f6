"""Cache and state sizes against published or hand-counted figures."""

from __future__ import annotations

import numpy as np
import pytest

from meshwright.models import Attention, LinearMixer, ModelSpec, cached_elements, load, state_bytes


def cache_of(model: ModelSpec, tokens: int, tp: int = 1) -> float:
    counts = zip(model.layer_counts(0, model.num_layers), model.kinds, strict=True)
    return sum(n * float(cached_elements(k.mixer, tokens, tp)) for n, k in counts if isinstance(k.mixer, Attention))


def test_grouped_heads_are_split_over_tp_until_one_is_left() -> None:
    model = load("llama-3.1-70b")  # 80 layers, 8 KV heads of 128, keys and values
    assert [cache_of(model, 1, tp) for tp in (1, 8, 16)] == [80 * 2 * 8 * 128, 80 * 2 * 128, 80 * 2 * 128]


def test_latent_cache_is_replicated_over_tp() -> None:
    model = load("deepseek-v3")  # 61 layers, 512 + 64 per token: 70,272 bytes in bf16, as its report states
    assert cache_of(model, 1) == cache_of(model, 1, 8) == 61 * 576
    assert cache_of(model, 1) * 2 == 70_272


def test_windows_bound_the_cache() -> None:
    model = load("gpt-oss-120b")  # 18 layers of 128 tokens, 18 full; 8 KV heads of 64
    per_token = 2 * 8 * 64
    assert cache_of(model, 100) == 36 * 100 * per_token
    assert cache_of(model, 10_000) == 18 * (128 + 10_000) * per_token


def test_index_keys_stay_whole_when_heads_are_split() -> None:
    model = load("minimax-m3")  # 57 sparse layers with one index key of 128; 4 KV heads of 128
    assert cache_of(model, 1, 4) == 60 * 2 * 128 + 57 * 128


def test_compressed_attention_keeps_a_fraction_and_its_window() -> None:
    model = load("deepseek-v4-pro")  # 31 layers of ratio 128, 30 of ratio 4 with index keys of 128
    tokens = 2**20
    expected = 31 * tokens * 4 + 30 * tokens * (512 + 128) // 4 + 61 * 128 * 512
    assert cache_of(model, tokens) == expected


def test_layers_that_share_keys_and_values_cache_none() -> None:
    config: dict[str, object] = {"model_type": "gemma4_text", "hidden_size": 64, "num_hidden_layers": 6}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32}
    config |= {"intermediate_size": 96, "vocab_size": 99, "sliding_window": 16, "hidden_size_per_layer_input": 0}
    config |= {"layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 2}
    assert cache_of(ModelSpec.from_config(config), 10) == 10 * 2 * (2 * 2 * 16 + 2 * 2 * 32)


def test_linear_mixers_keep_a_state_of_fixed_size() -> None:
    mixer = next(k.mixer for k in load("qwen3.5-35b-a3b").kinds if isinstance(k.mixer, LinearMixer))
    assert mixer.state_bytes == 32 * 128 * 128 * 4 + 8192 * 3 * 2
    assert state_bytes(mixer, np.array([1, 2, 32])) == pytest.approx(
        [mixer.state_bytes, mixer.state_bytes / 2, mixer.state_bytes / 32]
    )
