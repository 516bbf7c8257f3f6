"""Llama and its nearest kin: RMSNorm before attention and MLP, rotary positions, gated MLP.

Llama 2/3, Mistral, Qwen2/2.5 (q, k, v biases), Qwen3 (norms over q and k heads), Phi-3 (fused projections),
GLM-4 (dense).
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.models.assemble import alike, decoder, layer_kinds
from meshwright.models.blocks import Block, Heads, fused_qkv, gated_mlp, gqa, linear, norm
from meshwright.models.families.common import FULL, SLIDING, attention_types, base, heads, window_of
from meshwright.models.fields import Fields
from meshwright.models.spec import Attention, ModelSpec, Part


def two_norms(hidden: int) -> Block:
    return norm("input_layernorm", hidden) + norm("post_attention_layernorm", hidden)


def head_norms(sizes: Heads) -> Block:
    """Norms over each q and k head: one weight of head_dim for all heads."""
    q = norm("self_attn.q_norm", sizes.head_dim, over_hidden=False)
    return q + norm("self_attn.k_norm", sizes.head_dim, over_hidden=False)


def llama(fields: Fields) -> ModelSpec:
    b, bias = base(fields), fields.flag("attention_bias")
    sizes = heads(fields, b.hidden)
    width = fields.size("intermediate_size")
    layer = gqa(b.hidden, sizes, qkv_bias=bias, output_bias=bias)
    layer += gated_mlp(b.hidden, width, bias=fields.flag("mlp_bias")) + two_norms(b.hidden)
    return decoder(fields, b, alike(b, layer))


def mistral(fields: Fields) -> ModelSpec:
    """Mistral 7B v0.1 slides a window over every layer; later versions have none."""
    b = base(fields)
    sizes = heads(fields, b.hidden, kv_heads=8)
    window = fields.whole("sliding_window", most=10**9)
    layer = gqa(b.hidden, sizes, window=window)
    layer += gated_mlp(b.hidden, fields.size("intermediate_size")) + two_norms(b.hidden)
    return decoder(fields, b, alike(b, layer))


def qwen_attention_types(fields: Fields, layers: int) -> list[str]:
    """Qwen slides only where `use_sliding_window` is set, from layer `max_window_layers` on."""
    if "layer_types" in fields.values or not fields.flag("use_sliding_window"):
        return attention_types(fields, layers)
    first = fields.size("max_window_layers", default=layers, least=0)
    return [SLIDING if i >= first else FULL for i in range(layers)]


def qwen2(fields: Fields) -> ModelSpec:
    b = base(fields)
    sizes = heads(fields, b.hidden)

    def layer(kind: str) -> Block:
        attention = gqa(b.hidden, sizes, qkv_bias=True, window=window_of(fields, kind))
        return attention + gated_mlp(b.hidden, fields.size("intermediate_size")) + two_norms(b.hidden)

    kinds = layer_kinds(qwen_attention_types(fields, b.layers), layer)
    return decoder(fields, b, kinds)


def qwen3(fields: Fields) -> ModelSpec:
    b, bias = base(fields), fields.flag("attention_bias")
    sizes = heads(fields, b.hidden, head_dim=128)

    def layer(kind: str) -> Block:
        attention = gqa(b.hidden, sizes, qkv_bias=bias, output_bias=bias, window=window_of(fields, kind))
        mlp = gated_mlp(b.hidden, fields.size("intermediate_size"))
        return attention + head_norms(sizes) + mlp + two_norms(b.hidden)

    kinds = layer_kinds(qwen_attention_types(fields, b.layers), layer)
    return decoder(fields, b, kinds)


def phi3(fields: Fields) -> ModelSpec:
    b = base(fields)
    sizes = heads(fields, b.hidden)
    window = fields.whole("sliding_window", most=10**9)
    attention = fused_qkv("self_attn.qkv_proj", b.hidden, sizes)
    if isinstance(attention.mixer, Attention):
        attention = replace(attention, mixer=replace(attention.mixer, window=window))
    output = linear("self_attn.o_proj", sizes.heads * sizes.head_dim, b.hidden, "row", Part.ATTENTION, sizes.heads)
    mlp = gated_mlp(b.hidden, fields.size("intermediate_size"), fused=True)
    layer = attention + output + mlp + two_norms(b.hidden)
    return decoder(fields, b, alike(b, layer))


def glm4(fields: Fields) -> ModelSpec:
    """GLM-4 dense: q, k, v biases, fused gate and up, norms before and after both blocks."""
    b, bias = base(fields), fields.flag("attention_bias")
    sizes = heads(fields, b.hidden, head_dim=128)
    layer = gqa(b.hidden, sizes, qkv_bias=bias) + gated_mlp(b.hidden, fields.size("intermediate_size"), fused=True)
    layer += two_norms(b.hidden)
    layer += norm("post_self_attn_layernorm", b.hidden) + norm("post_mlp_layernorm", b.hidden)
    return decoder(fields, b, alike(b, layer))
