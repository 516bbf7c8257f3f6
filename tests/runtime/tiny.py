"""Tiny models of every family, small enough to run in float64 on forked ranks."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

_MLA: dict[str, Any] = {
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
_PLAIN_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8, "layer_pattern": 2},
    "phi3": {"pad_token_id": 0},
    "gpt2": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [2],
    },
    "deepseek_v2": _MLA
    | {"n_shared_experts": 2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "kv_heads": 4},
    "deepseek_v3": _MLA | {"n_shared_experts": 1, "n_group": 4, "topk_group": 2, "kv_heads": 4},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6} | _PLAIN_ROTARY,
}


def tiny(family: str = "llama", **changes: Any) -> Any:
    """A config of the family: 4 layers, hidden 32, 4 heads over 4 KV heads (2 where grouped), vocabulary 96."""
    sizes = {"layers": 4, "hidden": 32, "heads": 4, "kv_heads": 2, "mlp": 48, "vocab": 96}
    sizes |= {k: changes.pop(k) for k in list(changes) if k in sizes}
    common = {"vocab_size": sizes["vocab"], "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    if family == "gpt2":
        shape = {
            "n_layer": sizes["layers"],
            "n_embd": sizes["hidden"],
            "n_head": sizes["heads"],
            "n_inner": sizes["mlp"],
            "n_positions": 64,
        }
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return AutoConfig.for_model("gpt2", **(common | shape | dropout | changes))
    shape = {
        "num_hidden_layers": sizes["layers"],
        "hidden_size": sizes["hidden"],
        "num_attention_heads": sizes["heads"],
        "intermediate_size": sizes["mlp"],
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    own = dict(SHAPES[family])
    if family != "gpt_neox":
        shape["num_key_value_heads"] = own.pop("kv_heads", sizes["kv_heads"])
    pattern = own.pop("layer_pattern", None)
    if pattern:
        own["layer_types"] = ["full_attention" if i % pattern else "sliding_attention" for i in range(sizes["layers"])]
    return AutoConfig.for_model(family, **(common | shape | own | changes))
