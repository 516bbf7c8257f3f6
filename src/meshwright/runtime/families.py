"""How each decoder family of transformers is taken apart: where its parts are and how its products split over tp.

A `Family` is data; `parallelize` and `stage` follow it. A model that is not described here, or that has a part the
description does not know, is refused with the name of that part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from meshwright.errors import InputError, suggestion


class Units(StrEnum):
    """What is indivisible along the split dimension of a product."""

    HEADS = "attention heads"
    KV_HEADS = "KV heads"
    MLP = "MLP columns"


class Split(StrEnum):
    COLUMN = "column"
    ROW = "row"


@dataclass(frozen=True)
class Product:
    """A linear module of a layer. `blocks`: units of each block of a fused weight (one block: not fused).

    `transposed`: stored [in, out] (GPT-2's Conv1D).
    """

    path: str
    split: Split
    blocks: tuple[Units, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """Names of the parts inside the causal language model of a family.

    `norms` are modules of a layer that are replicated over tp; `head_norms` are those applied to single heads.
    `width_attributes` are counts kept by the attention module that must become local: {attribute: units}.
    """

    base: str
    embedding: str
    layers: str
    final_norm: str
    attention: str
    mlp: str
    products: tuple[Product, ...]
    norms: tuple[str, ...]
    rotary: str | None = "rotary_emb"
    position_embedding: str | None = None
    embedding_dropout: str | None = None
    head_norms: tuple[str, ...] = ()
    local_config_heads: bool = False  # attention reads config.num_attention_heads
    split_size: bool = False  # attention cuts its fused output at `split_size`
    layer_mask: str = "causal"  # 'causal', 'sliding' (all layers, if config has a window) or 'by layer' (layer_types)
    rotary_by_layer: bool = False


_LLAMA = Family(
    base="model",
    embedding="embed_tokens",
    layers="layers",
    final_norm="norm",
    attention="self_attn",
    mlp="mlp",
    products=(
        Product("self_attn.q_proj", Split.COLUMN, (Units.HEADS,)),
        Product("self_attn.k_proj", Split.COLUMN, (Units.KV_HEADS,)),
        Product("self_attn.v_proj", Split.COLUMN, (Units.KV_HEADS,)),
        Product("self_attn.o_proj", Split.ROW, (Units.HEADS,)),
        Product("mlp.gate_proj", Split.COLUMN, (Units.MLP,)),
        Product("mlp.up_proj", Split.COLUMN, (Units.MLP,)),
        Product("mlp.down_proj", Split.ROW, (Units.MLP,)),
    ),
    norms=("input_layernorm", "post_attention_layernorm"),
)
_QWEN3 = replace(_LLAMA, head_norms=("self_attn.q_norm", "self_attn.k_norm"), layer_mask="by layer")
_PHI3 = replace(
    _LLAMA,
    products=(
        Product("self_attn.qkv_proj", Split.COLUMN, (Units.HEADS, Units.KV_HEADS, Units.KV_HEADS)),
        Product("self_attn.o_proj", Split.ROW, (Units.HEADS,)),
        Product("mlp.gate_up_proj", Split.COLUMN, (Units.MLP, Units.MLP)),
        Product("mlp.down_proj", Split.ROW, (Units.MLP,)),
    ),
    layer_mask="sliding",
    local_config_heads=True,
)
_GPT2 = Family(
    base="transformer",
    embedding="wte",
    layers="h",
    final_norm="ln_f",
    attention="attn",
    mlp="mlp",
    products=(
        Product("attn.c_attn", Split.COLUMN, (Units.HEADS, Units.HEADS, Units.HEADS), transposed=True),
        Product("attn.c_proj", Split.ROW, (Units.HEADS,), transposed=True),
        Product("mlp.c_fc", Split.COLUMN, (Units.MLP,), transposed=True),
        Product("mlp.c_proj", Split.ROW, (Units.MLP,), transposed=True),
    ),
    norms=("ln_1", "ln_2"),
    rotary=None,
    position_embedding="wpe",
    embedding_dropout="drop",
    split_size=True,
)
_GPT_NEOX = Family(
    base="gpt_neox",
    embedding="embed_in",
    layers="layers",
    final_norm="final_layer_norm",
    attention="attention",
    mlp="mlp",
    products=(
        Product("attention.query_key_value", Split.COLUMN, (Units.HEADS,)),  # interleaved head by head: one block
        Product("attention.dense", Split.ROW, (Units.HEADS,)),
        Product("mlp.dense_h_to_4h", Split.COLUMN, (Units.MLP,)),
        Product("mlp.dense_4h_to_h", Split.ROW, (Units.MLP,)),
    ),
    norms=("input_layernorm", "post_attention_layernorm"),
    embedding_dropout="emb_dropout",
)

_FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, layer_mask="sliding"),
    "qwen2": replace(_LLAMA, layer_mask="by layer"),
    "qwen3": _QWEN3,
    "gemma3_text": replace(
        _QWEN3,
        norms=(*_LLAMA.norms, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        rotary_by_layer=True,
    ),
    "phi3": _PHI3,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
}


def supported_model_types() -> tuple[str, ...]:
    return tuple(sorted(_FAMILIES))


def family_of(config: Any) -> Family:
    """The family of a transformers config, or an InputError that names what is not known about it."""
    model_type = str(config.model_type)
    if model_type not in _FAMILIES:
        raise InputError(
            f"model type '{model_type}' cannot be run: how its layers split is not described"
            f"{suggestion(model_type, _FAMILIES)}; known are {', '.join(supported_model_types())}"
        )
    unknown = {
        "add_cross_attention": "cross-attention layers",
        "use_bidirectional_attention": "bidirectional attention",
        "num_experts": "routed experts",
    }
    for attribute, part in unknown.items():
        if getattr(config, attribute, None):
            raise InputError(f"model type '{model_type}' with {attribute} set cannot be run: {part} are not described")
    return _FAMILIES[model_type]


def unit_count(config: Any, units: Units) -> int | None:
    """How many of the units the model has; None where it is the width itself."""
    if units is Units.HEADS:
        return int(config.num_attention_heads)
    if units is Units.KV_HEADS:
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return None
