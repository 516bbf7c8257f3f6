"""What the specs say of caches and states, against published or hand-counted figures."""

from __future__ import annotations

from meshwright.models import Attention, LinearMixer, ModelSpec, load


def attentions(model: ModelSpec) -> list[Attention]:
    mixers = [model.kinds[k].mixer for k in model.pattern]
    return [m for m in mixers if isinstance(m, Attention)]


def per_token(model: ModelSpec) -> int:
    return sum(a.kv_cache_elements for a in attentions(model))


def test_grouped_heads_cache_keys_and_values() -> None:
    model = load("llama-3.1-70b")  # 80 layers, 8 KV heads of 128: 320 KiB per token in bf16
    assert per_token(model) * 2 == 320 * 1024
    assert not any(a.kv_replicated for a in attentions(model))


def test_latent_attention_caches_the_latent_on_every_tp_rank() -> None:
    model = load("deepseek-v3")  # 61 layers of 512 + 64: 70,272 bytes in bf16, as its inference paper states
    assert per_token(model) * 2 == 70_272
    assert all(a.kv_replicated and a.absorbed_dims == (576, 512) for a in attentions(model))


def test_key_and_value_heads_may_differ_in_size() -> None:
    full, sliding = attentions(load("mimo-v2-flash"))[:2]
    assert full.kv_cache_elements == 4 * (192 + 128)
    assert sliding.kv_cache_elements == 8 * (192 + 128)


def test_index_keys_are_cached_beside() -> None:
    dense, sparse = attentions(load("minimax-m3"))[0], attentions(load("minimax-m3"))[-1]
    assert sparse.kv_cache_elements - dense.kv_cache_elements == 128
    assert attentions(load("glm-5"))[0].kv_cache_elements == 512 + 64 + 128
    assert attentions(load("glm-5.2"))[3].kv_cache_elements == 512 + 64  # uses an earlier layer's picks


def test_compressed_attention_keeps_one_key_per_so_many_tokens() -> None:
    layers = attentions(load("deepseek-v4-pro"))
    assert [a.kv_compression for a in layers[:4]] == [128, 128, 4, 128]
    assert {(a.kv_compression, a.kv_cache_elements) for a in layers} == {(128, 512), (4, 512 + 128)}
    assert all(a.window == 128 and a.kv_replicated for a in layers)


def test_layers_that_share_keys_and_values_cache_none() -> None:
    config: dict[str, object] = {"model_type": "gemma4_text", "hidden_size": 64, "num_hidden_layers": 6}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32}
    config |= {"intermediate_size": 96, "vocab_size": 99, "sliding_window": 16, "hidden_size_per_layer_input": 0}
    config |= {"layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 2}
    own = [2 * 2 * 16, 2 * 2 * 32] * 2
    assert [a.kv_cache_elements for a in attentions(ModelSpec.from_config(config))] == [*own, 0, 0]


def test_linear_mixers_keep_a_state_of_fixed_size() -> None:
    mixer = next(k.mixer for k in load("qwen3.5-35b-a3b").kinds if isinstance(k.mixer, LinearMixer))
    assert mixer.state_bytes == 32 * 128 * 128 * 4 + 8192 * 3 * 2
    mamba = next(k.mixer for k in load("nemotron-h-56b").kinds if isinstance(k.mixer, LinearMixer))
    assert mamba.state_bytes == 256 * 256 * 64 * 2 + 20480 * 3 * 2
