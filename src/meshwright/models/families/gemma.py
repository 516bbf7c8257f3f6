"""Gemma 1 to 4: tied and scaled embedding, wide heads, gated GELU MLP; from Gemma 2 four norms and sliding layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from meshwright.models.assemble import alike, decoder, embedding, layer_kinds
from meshwright.models.blocks import (
    Block,
    Heads,
    gated_mlp,
    gqa,
    linear,
    norm,
    routed_experts,
    router,
    softmax_attention,
    vector,
    with_shared_expert,
)
from meshwright.models.families.common import FULL, attention_types, base, heads, window_of
from meshwright.models.families.llama import head_norms, two_norms
from meshwright.models.families.moe import expert_sizes
from meshwright.models.fields import Fields
from meshwright.models.spec import ModelSpec, Part, TensorSpec

GELU = "gelu_pytorch_tanh"


def four_norms(hidden: int) -> Block:
    block = two_norms(hidden)
    for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm"):
        block += norm(name, hidden)
    return block


def gemma(fields: Fields) -> ModelSpec:
    b, bias = base(fields, tied=True), fields.flag("attention_bias")
    sizes = heads(fields, b.hidden, head_dim=256)
    layer = gqa(b.hidden, sizes, qkv_bias=bias, output_bias=bias)
    layer += gated_mlp(b.hidden, fields.size("intermediate_size")) + two_norms(b.hidden)
    return decoder(fields, b, alike(b, layer), activation=GELU)


def gemma2(fields: Fields) -> ModelSpec:
    return _sliding_gemma(fields, every=2, qk_norm=False)


GEMMA3_DEFAULTS: dict[str, object] = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208}
"""What Google's Gemma 3 configs leave to transformers' Gemma3TextConfig (4B states neither heads nor vocabulary)."""


def gemma3(fields: Fields) -> ModelSpec:
    fields = Fields({**GEMMA3_DEFAULTS, **fields.values}, fields.label)
    return _sliding_gemma(fields, every=fields.size("sliding_window_pattern", default=6), qk_norm=True)


def _sliding_gemma(fields: Fields, *, every: int, qk_norm: bool) -> ModelSpec:
    b, bias = base(fields, tied=True), fields.flag("attention_bias")
    sizes = heads(fields, b.hidden, head_dim=256)

    def layer(kind: str) -> Block:
        block = gqa(b.hidden, sizes, qkv_bias=bias, output_bias=bias, window=window_of(fields, kind))
        if qk_norm:
            block += head_norms(sizes)
        return block + gated_mlp(b.hidden, fields.size("intermediate_size")) + four_norms(b.hidden)

    kinds = layer_kinds(attention_types(fields, b.layers, every=every), layer)
    return decoder(fields, b, kinds, activation=GELU)


@dataclass(frozen=True)
class Gemma4Layer:
    """What decides the shape of a Gemma 4 layer. `shared`: it reads the keys and values of an earlier layer."""

    attention: str
    shared: bool

    def __str__(self) -> str:
        return f"{self.attention}+shared_kv" if self.shared else self.attention


def gemma4(fields: Fields) -> ModelSpec:
    """Global layers have wider heads (`global_head_dim`) and may use their keys as values; a dense MLP stands beside
    the experts; small models add a per-layer embedding and layers that share keys and values."""
    b = base(fields, tied=True)
    types = attention_types(fields, b.layers, every=6)
    types[-1] = FULL  # transformers forces the last layer to be global
    shared = fields.size("num_kv_shared_layers", default=0, least=0)
    if shared >= b.layers:
        raise fields.error(f"num_kv_shared_layers {shared} must be less than the {b.layers} layers")
    keys = [Gemma4Layer(kind, i >= b.layers - shared) for i, kind in enumerate(types)]
    per_layer = fields.size("hidden_size_per_layer_input", default=256, least=0)
    kinds = layer_kinds(keys, lambda key: _gemma4_layer(fields, b.hidden, key, per_layer))
    embeddings = [embedding("model.embed_tokens.weight", b.vocab, b.hidden)]
    if per_layer:
        width = b.layers * per_layer
        rows = fields.size("vocab_size_per_layer_input", default=b.vocab)
        embeddings.append(embedding("model.embed_tokens_per_layer.weight", rows, width))
        embeddings.append(TensorSpec("model.per_layer_model_projection.weight", (width, b.hidden), Part.EMBEDDING))
        embeddings += norm("model.per_layer_projection_norm", per_layer).tensors
    return decoder(
        fields,
        b,
        kinds,
        embeddings=tuple(embeddings),
        activation=GELU,
    )


def _gemma4_layer(fields: Fields, hidden: int, key: Gemma4Layer, per_layer: int) -> Block:
    block = _gemma4_attention(fields, hidden, key) + four_norms(hidden)
    width = fields.size("intermediate_size") * (2 if key.shared and fields.flag("use_double_wide_mlp") else 1)
    if not fields.flag("enable_moe_block"):
        block += gated_mlp(hidden, width)
    else:
        # The dense MLP runs on every token beside the experts: in costs it is a shared expert.
        experts = expert_sizes(fields)
        block += vector("router.scale", hidden, Part.ROUTER)
        block += vector("router.per_expert_scale", experts.experts, Part.ROUTER)
        block += router("router.proj", hidden, experts.experts) + routed_experts(hidden, experts, prefix="experts.")
        for name in ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2"):
            block += norm(name, hidden)
        block = with_shared_expert(block, gated_mlp(hidden, width, part=Part.SHARED_EXPERT), width)
    if per_layer:
        block += linear("per_layer_input_gate", hidden, per_layer, "none", Part.MLP)
        block += linear("per_layer_projection", per_layer, hidden, "none", Part.MLP)
        block += norm("post_per_layer_input_norm", hidden)
    return block


def _gemma4_attention(fields: Fields, hidden: int, key: Gemma4Layer) -> Block:
    bias, full = fields.flag("attention_bias"), key.attention == FULL
    sizes = heads(fields, hidden, head_dim=256)
    values_are_keys = full and fields.flag("attention_k_eq_v")
    if full:
        kv = fields.size("num_global_key_value_heads", default=sizes.kv_heads) if values_are_keys else sizes.kv_heads
        sizes = Heads(sizes.heads, kv, fields.size("global_head_dim", default=512))
    block = gqa(
        hidden,
        sizes,
        qkv_bias=bias,
        output_bias=bias,
        window=window_of(fields, key.attention),
        values=not values_are_keys,
    )
    block += head_norms(sizes)
    if key.shared:
        own = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm")
        block = replace(
            block,
            tensors=tuple(t for t in block.tensors if not t.name.startswith(own)),
            matmuls=tuple(m for m in block.matmuls if not m.name.startswith(own)),
            mixer=replace(softmax_attention(sizes, window_of(fields, key.attention)), kv_cache_elements=0),
        )
    return block
