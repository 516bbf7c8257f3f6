"""Every tensor of every catalogued model: name and shape as in transformers' own model built on the meta device."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from meshwright.models import CatalogueEntry, ModelSpec, TensorSpec, catalogue, load
from meshwright.models.families.kin import TRAITS

pytest.importorskip("transformers")

from tests.models.twins import Shapes, twin_shapes

NOT_IN_TRANSFORMERS = {
    # Attention residuals, latent experts and the full-rank gate of Kimi-K3 need its own remote code: counted from the
    # tensors of the published checkpoint, checked against the published total only.
    "kimi-k3",
}
SHARED_CONFIGS = Path(__file__).parents[3] / "shared" / "configs"


def shapes_of(tensors: tuple[TensorSpec, ...]) -> Shapes:
    return {t.name: t.shape for t in tensors}


def assert_same_tensors(spec: ModelSpec, config: dict[str, Any]) -> None:
    outer, layers = twin_shapes(config)
    assert shapes_of(spec.outer_tensors) == outer
    assert len(layers) == spec.num_layers
    kinds = [shapes_of(kind.tensors) for kind in spec.kinds]
    for index, layer in enumerate(layers):
        assert kinds[spec.pattern[index]] == layer, f"layer {index}"
    total = sum(math.prod(s) for shapes in (outer, *layers) for s in shapes.values())
    assert spec.parameters == total


@pytest.mark.parametrize("entry", [e for e in catalogue() if e.name not in NOT_IN_TRANSFORMERS], ids=lambda e: e.name)
def test_tensors_equal_those_of_transformers(entry: CatalogueEntry) -> None:
    assert_same_tensors(load(entry.name), json.loads(entry.config_file.read_text()))


@pytest.mark.parametrize("entry", [e for e in catalogue() if e.parameters_b], ids=lambda e: e.name)
def test_total_is_within_2_percent_of_the_published_count(entry: CatalogueEntry) -> None:
    assert load(entry.name).parameters / 1e9 == pytest.approx(entry.parameters_b, rel=0.02)


def test_kimi_k3_is_kimi_linear_and_what_its_report_adds() -> None:
    entry = next(e for e in catalogue() if e.name == "kimi-k3")
    config = json.loads(entry.config_file.read_text())
    config["text_config"]["hidden_act"] = "silu"  # transformers lacks the activation, which has no tensors
    spec = load("kimi-k3")
    outer, layers = twin_shapes(config)
    residual = {"self_attention_res_norm", "self_attention_res_proj", "mlp_res_norm", "mlp_res_proj"}
    latent = {"mlp.routed_expert_down_proj", "mlp.routed_expert_up_proj", "mlp.routed_expert_norm"}
    full_gate = {"self_attn.g_proj"}
    for index, gate, moe in ((0, full_gate, set[str]()), (1, full_gate, latent), (3, full_gate, latent)):
        ours, theirs = shapes_of(spec.kinds[spec.pattern[index]].tensors), layers[index]
        assert set(ours) - set(theirs) == {f"{name}.weight" for name in residual | moe | gate}
        lacking = set() if index == 3 else {"self_attn.g_a_proj.weight", "self_attn.g_b_proj.weight"}
        assert set(theirs) - set(ours) == lacking
        differ = {name for name in set(ours) & set(theirs) if ours[name] != theirs[name]}
        assert differ == ({"mlp.experts.gate_up_proj", "mlp.experts.down_proj"} if moe else set())
    added = {"model.output_attn_res_norm.weight", "model.output_attn_res_proj.weight"}
    assert set(shapes_of(spec.outer_tensors)) - set(outer) == added


def test_what_transformers_cannot_build_has_a_published_count() -> None:
    assert {e.name for e in catalogue() if e.parameters_b} >= NOT_IN_TRANSFORMERS


SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 99}
GATED = SMALL | {"intermediate_size": 96}
MLA = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 2}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
MAMBA = {
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "n_groups": 2,
    "ssm_state_size": 16,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_key_value_heads": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama-biases": GATED
    | {"model_type": "llama", "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "head_dim": 24},
    "llama-tied": GATED | {"model_type": "llama", "tie_word_embeddings": True},
    "mistral-kv-default": GATED | {"model_type": "mistral", "num_attention_heads": 8},
    "qwen2-sliding": GATED
    | {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 2}
    | {"sliding_window": 16},
    "qwen3-biases": GATED | {"model_type": "qwen3", "attention_bias": True, "num_key_value_heads": 4},
    "qwen2-moe-some-dense": GATED
    | {"model_type": "qwen2_moe", "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 2},
    "qwen3-moe-some-dense": GATED
    | {"model_type": "qwen3_moe", "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 32, "mlp_only_layers": [1]},
    "qwen3.5-dense": GATED
    | DELTA
    | {"model_type": "qwen3_5_text", "num_key_value_heads": 2, "head_dim": 16, "full_attention_interval": 2},
    "qwen3-next-dense-layer": GATED
    | DELTA
    | {"model_type": "qwen3_next", "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "mlp_only_layers": [0]},
    "deepseek-v2-no-q-rank": GATED
    | MLA
    | EXPERTS
    | {"model_type": "deepseek_v2", "q_lora_rank": None, "first_k_dense_replace": 1},
    "deepseek-v3-biases": GATED
    | MLA
    | EXPERTS
    | {"model_type": "deepseek_v3", "attention_bias": True, "first_k_dense_replace": 2, "n_group": 1},
    "deepseek-v3.2": GATED
    | MLA
    | EXPERTS
    | {"model_type": "deepseek_v32", "first_k_dense_replace": 1, "index_n_heads": 4, "index_head_dim": 8}
    | {"index_topk": 16, "n_group": 1, "topk_group": 1},
    "glm-5-shared-indexer": GATED
    | MLA
    | EXPERTS
    | {"model_type": "glm_moe_dsa", "first_k_dense_replace": 1, "index_n_heads": 4, "index_head_dim": 8}
    | {"index_topk": 16, "indexer_types": ["full", "full", "shared", "full"], "n_group": 1, "topk_group": 1},
    "kimi-linear": GATED
    | MLA
    | {"model_type": "kimi_linear", "num_experts": 8, "num_experts_per_token": 2, "moe_intermediate_size": 32}
    | {"num_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": None, "pad_token_id": 0}
    | {"linear_attn_config": {"full_attn_layers": [2, 4], "kda_layers": [1, 3], "num_heads": 4, "head_dim": 8}},
    "gemma-4-small": GATED
    | {"model_type": "gemma4_text", "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32}
    | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 99, "num_kv_shared_layers": 2}
    | {"use_double_wide_mlp": True, "sliding_window": 16}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "nemotron-h-biases": MAMBA
    | {"model_type": "nemotron_h", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 99}
    | {"hybrid_override_pattern": "M-*M", "num_hidden_layers": 4, "mlp_bias": True, "attention_bias": True}
    | {"use_conv_bias": False, "expand": 2},
    "falcon-serial": SMALL
    | {"model_type": "falcon", "new_decoder_architecture": False, "multi_query": False, "parallel_attn": False}
    | {"bias": True, "alibi": True},
    "falcon-one-norm": SMALL
    | {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    "opt-plain-norms": SMALL
    | {"model_type": "opt", "ffn_dim": 96, "layer_norm_elementwise_affine": False, "enable_bias": False}
    | {"word_embed_proj_dim": 64},
    "gpt2-inner": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 80, "vocab_size": 99}
    | {"n_positions": 32},
    "gpt-neox-no-bias": SMALL | {"model_type": "gpt_neox", "intermediate_size": 96, "attention_bias": False},
    "mpt-small": {"model_type": "mpt", "d_model": 64, "n_layers": 2, "n_heads": 4, "expansion_ratio": 4}
    | {"vocab_size": 99},
    "nemotron-biases": GATED
    | {"model_type": "nemotron", "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "llama-4-every-third": GATED
    | {"model_type": "llama4_text", "num_key_value_heads": 2, "head_dim": 16, "intermediate_size_mlp": 80}
    | {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 3, "attention_bias": True},
    "mimo-own-heads": GATED
    | EXPERTS
    | {"model_type": "mimo_v2_flash", "num_key_value_heads": 2, "head_dim": 16, "v_head_dim": 8, "sliding_window": 16}
    | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 16, "swa_v_head_dim": 8}
    | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]}
    | {"n_shared_experts": None, "hybrid_layer_pattern": [0, 1, 1, 0], "moe_layer_freq": [0, 1, 1, 1]},
    "glm-4.7-flash": GATED
    | MLA
    | {"model_type": "glm4_moe_lite", "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    | {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "cohere-qk-norm": GATED | {"model_type": "cohere", "num_key_value_heads": 2, "use_qk_norm": True},
    "arcee-biases": GATED | {"model_type": "arcee", "num_key_value_heads": 2, "mlp_bias": True, "attention_bias": True},
    "seed-oss-all-biases": GATED
    | {"model_type": "seed_oss", "num_key_value_heads": 2, "attention_out_bias": True, "mlp_bias": True},
    "ernie-biases": GATED | {"model_type": "ernie4_5", "num_key_value_heads": 2, "use_bias": True},
    "phimoe-head-bias": GATED
    | {"model_type": "phimoe", "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    | {"attention_bias": True, "lm_head_bias": True},
    "phi-3-grouped": GATED | {"model_type": "phi3", "num_key_value_heads": 2, "pad_token_id": 0},
    "gpt-oss-no-bias": GATED
    | {"model_type": "gpt_oss", "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4}
    | {"num_experts_per_tok": 2, "attention_bias": False, "sliding_window": 16},
}


@pytest.mark.parametrize("family", sorted(TRAITS))
def test_tensors_of_llamas_kin_equal_those_of_transformers(family: str) -> None:
    config = GATED | {"model_type": family, "num_key_value_heads": 2, "pad_token_id": 0}
    if TRAITS[family].experts:
        config |= {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    assert_same_tensors(ModelSpec.from_config(config), config)


@pytest.mark.parametrize("name", VARIANTS)
def test_tensors_of_uncommon_settings_equal_those_of_transformers(name: str) -> None:
    assert_same_tensors(ModelSpec.from_config(VARIANTS[name]), VARIANTS[name])


@pytest.mark.skipif(not SHARED_CONFIGS.is_dir(), reason="the folder of shared configs is not here")
def test_every_shared_config_is_in_the_catalogue() -> None:
    catalogued = {json.dumps(json.loads(e.config_file.read_text()), sort_keys=True) for e in catalogue()}
    files = sorted(SHARED_CONFIGS.glob("*.json"))
    assert len(files) > 30
    for file in files:
        assert json.dumps(json.loads(file.read_text()), sort_keys=True) in catalogued, file.name
