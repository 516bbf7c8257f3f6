"""Shrink a model so that parity can run it in float64 on one machine: same family, same kinds of layers, small sizes.

What the layout can get wrong is kept: the ratio of KV heads to tp, tied embeddings, odd vocabularies, sliding windows,
the pattern of layer types, dense layers among those with experts, groups of experts, uneven layer splits.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig
from meshwright.runtime.families import expert_count, family_of

HEAD_DIM = 8
MOST_RANKS = 16


def shrunk(model_config: Any, config: HybridParallelConfig, seq: int) -> tuple[Any, HybridParallelConfig]:
    """A small model of the same family, and the plan with its layer split and batch to match."""
    small = copy.deepcopy(model_config)
    chunks = config.pp * config.vpp
    split = None if config.layer_split is None else tuple(min(n, 2) for n in config.layer_split)
    layers = sum(split) if split else max(chunks, min(int(small.num_hidden_layers), 2 * chunks, 4))
    heads, kv_heads = _heads(model_config, config.tp)
    small.num_hidden_layers = layers
    small.num_attention_heads = heads
    if getattr(small, "num_key_value_heads", None):
        small.num_key_value_heads = kv_heads
    small.hidden_size = heads * HEAD_DIM
    if hasattr(small, "head_dim") and small.head_dim is not None:
        small.head_dim = HEAD_DIM
    if getattr(small, "query_pre_attn_scalar", None):
        small.query_pre_attn_scalar = HEAD_DIM
    width = 6 * HEAD_DIM * config.tp
    if hasattr(small, "n_inner"):
        small.n_inner = width
    else:
        small.intermediate_size = width
    _shrink_experts(small, config, layers)
    _shrink_latent_attention(small)
    small.vocab_size = 128 if int(model_config.vocab_size) % config.tp == 0 else 128 + config.tp - 1
    small.max_position_embeddings = max(seq, 32)
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, token, None)
    if getattr(small, "sliding_window", None):
        small.sliding_window = max(2, seq // 3)
    if getattr(small, "layer_types", None):
        small.layer_types = _layer_types(list(small.layer_types), layers)
    batch = config.dp * config.micro_batch * min(config.num_microbatches, 2 * config.pp + 1)
    return small, replace(config, layer_split=split, global_batch=batch)


def _shrink_experts(small: Any, config: HybridParallelConfig, layers: int) -> None:
    """Eight experts, or as many as ep needs; about two per token."""
    family = family_of(small)
    if not expert_count(small, family):
        return
    assert family.moe is not None
    setattr(small, family.moe.count, math.lcm(8, config.ep))
    small.num_experts_per_tok = min(int(small.num_experts_per_tok), 3)
    for width in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        if getattr(small, width, None):
            setattr(small, width, HEAD_DIM * math.lcm(config.tp, config.expert_tp))
    if (getattr(small, "n_group", None) or 1) > 1:
        small.n_group, small.topk_group = 4, 2
    if getattr(small, "first_k_dense_replace", None):
        small.first_k_dense_replace = min(int(small.first_k_dense_replace), layers // 2)
    if getattr(small, "mlp_only_layers", None):
        small.mlp_only_layers = [layer for layer in small.mlp_only_layers if layer < layers]
    if getattr(small, "decoder_sparse_step", None):
        small.decoder_sparse_step = min(int(small.decoder_sparse_step), layers)


def _shrink_latent_attention(small: Any) -> None:
    if not getattr(small, "kv_lora_rank", None):
        return
    small.num_key_value_heads = small.num_attention_heads
    small.kv_lora_rank = 2 * HEAD_DIM
    if small.q_lora_rank is not None:
        small.q_lora_rank = HEAD_DIM
    small.qk_nope_head_dim, small.qk_rope_head_dim, small.v_head_dim = HEAD_DIM, HEAD_DIM // 2, HEAD_DIM
    small.head_dim, small.qk_head_dim = HEAD_DIM // 2, HEAD_DIM + HEAD_DIM // 2


def without_dropout(model_config: Any) -> Any:
    """The same model without dropout, whose plain masks depend on the order in which one process draws them."""
    still = copy.deepcopy(model_config)
    for name, value in vars(model_config).items():
        if name.endswith(("dropout", "_pdrop")) and isinstance(value, float):
            setattr(still, name, 0.0)
    return still


def refuse_too_many_ranks(config: HybridParallelConfig) -> None:
    if config.world_size > MOST_RANKS:
        raise InputError(
            f"the plan has {config.world_size} ranks, more than the {MOST_RANKS} that parity forks on one machine; "
            "give smaller sizes with the same kinds of parallelism, like dp 2, pp 2, tp 2"
        )


def _heads(model_config: Any, tp: int) -> tuple[int, int]:
    """Few heads with the model's relation of query heads, KV heads and tp."""
    heads = int(model_config.num_attention_heads)
    kv_heads = int(getattr(model_config, "num_key_value_heads", None) or heads)
    own_kv = next((n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and (n % tp == 0 or n == kv_heads)), kv_heads)
    ratio = heads // kv_heads
    per_kv = next((r for r in range(min(2, ratio), ratio + 1) if own_kv * r % tp == 0), ratio)
    return own_kv * per_kv, own_kv


def _layer_types(types: list[str], layers: int) -> list[str]:
    """The first layers' types; if they are all alike where the model's are not, the last one differs."""
    kept = types[:layers]
    others = [t for t in types if t != kept[0]]
    if others and len(set(kept)) == 1:
        kept[-1] = others[0]
    return kept
