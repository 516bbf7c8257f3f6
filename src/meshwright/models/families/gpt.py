"""The GPT line: LayerNorm with bias, plain MLP, biases everywhere.

GPT-2 (and GPT-3, which has its form: Brown et al. 2020, table 2.1), OPT, BLOOM, GPT-NeoX, GPT-J, Falcon, MPT.
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.models.assemble import alike, decoder, embedding, head
from meshwright.models.blocks import Block, fused_qkv, gqa, linear, norm, plain_mlp
from meshwright.models.families.common import base, full_heads, heads
from meshwright.models.fields import Fields
from meshwright.models.spec import ModelSpec, Part, TensorSpec


def layer_norms(hidden: int, *names: str, bias: bool = True) -> Block:
    block = Block()
    for name in names:
        block += norm(name, hidden, bias)
    return block


def gpt2(fields: Fields) -> ModelSpec:
    """Fused q, k, v as a Conv1D (weights stored [in, out]); learned positions; head tied to the embedding."""
    b = base(fields, tied=True)
    h = b.hidden
    sizes = full_heads(fields, h, "n_head", "num_attention_heads")
    width = fields.size("n_inner", "intermediate_size", default=4 * h)
    layer = fused_qkv("attn.c_attn", h, sizes, bias=True, transposed=True)
    layer += linear("attn.c_proj", h, h, "row", Part.ATTENTION, sizes.heads, bias=True, transposed=True)
    layer += plain_mlp(h, width, ("mlp.c_fc", "mlp.c_proj"), transposed=True) + layer_norms(h, "ln_1", "ln_2")
    positions = fields.size("n_positions", "n_ctx", "max_position_embeddings", default=1024)
    return decoder(
        fields,
        b,
        alike(b, layer),
        embeddings=(
            embedding("transformer.wte.weight", b.vocab, h),
            embedding("transformer.wpe.weight", positions, h, split=False),
        ),
        final=norm("transformer.ln_f", h, True).tensors,
        activation="gelu_new",
        dropout=fields.number("resid_pdrop", default=0.1),
    )


def opt(fields: Fields) -> ModelSpec:
    """Learned positions (2 more rows than positions: transformers' offset). OPT-350m projects its embedding and norms
    after the blocks."""
    b = base(fields, tied=True)
    h, bias = b.hidden, fields.flag("enable_bias", default=True)
    sizes = full_heads(fields, h, "num_attention_heads")
    affine = fields.flag("layer_norm_elementwise_affine", default=True)
    layer = gqa(h, sizes, output="out_proj", qkv_bias=bias, output_bias=bias)
    layer += plain_mlp(h, fields.size("ffn_dim"), ("fc1", "fc2"), bias=bias)
    if affine:
        layer += layer_norms(h, "self_attn_layer_norm", "final_layer_norm")
    inner = fields.size("word_embed_proj_dim", default=h)
    positions = fields.size("max_position_embeddings", default=2048)
    prefix = "model.decoder."
    embeddings = [
        embedding(f"{prefix}embed_tokens.weight", b.vocab, inner),
        embedding(f"{prefix}embed_positions.weight", positions + 2, h, split=False),
    ]
    final: list[TensorSpec] = []
    if inner != h:
        embeddings.append(TensorSpec(f"{prefix}project_in.weight", (h, inner), Part.EMBEDDING))
        final.append(TensorSpec(f"{prefix}project_out.weight", (inner, h), Part.HEAD))
    elif fields.flag("do_layer_norm_before", default=True) and not fields.flag("_remove_final_layer_norm"):
        final.extend(norm(f"{prefix}final_layer_norm", h, affine).tensors if affine else ())
    return decoder(
        fields,
        b,
        alike(b, layer),
        embeddings=tuple(embeddings),
        final=tuple(final),
        head_tensors=head(b.vocab, inner),
        activation="relu",
        dropout=fields.number("dropout", default=0.1),
    )


def bloom(fields: Fields) -> ModelSpec:
    """ALiBi positions (none learned), a norm on the embedding, fused q, k, v per head."""
    b = base(fields, tied=True)
    h = b.hidden
    sizes = full_heads(fields, h, "n_head", "num_attention_heads")
    layer = layer_norms(h, "input_layernorm", "post_attention_layernorm")
    layer += fused_qkv("self_attention.query_key_value", h, sizes, bias=True)
    layer += linear("self_attention.dense", h, h, "row", Part.ATTENTION, sizes.heads, bias=True)
    layer += plain_mlp(h, 4 * h, ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"))
    return decoder(
        fields,
        b,
        alike(b, layer),
        embeddings=(
            embedding("transformer.word_embeddings.weight", b.vocab, h),
            *norm("transformer.word_embeddings_layernorm", h, True).tensors,
        ),
        final=norm("transformer.ln_f", h, True).tensors,
        activation="gelu",
        dropout=fields.number("hidden_dropout"),
    )


def gpt_neox(fields: Fields) -> ModelSpec:
    """Rotary positions, parallel residual, fused q, k, v per head, untied head."""
    b = base(fields)
    h, bias = b.hidden, fields.flag("attention_bias", default=True)
    sizes = full_heads(fields, h, "num_attention_heads")
    layer = layer_norms(h, "input_layernorm", "post_attention_layernorm")
    layer += fused_qkv("attention.query_key_value", h, sizes, bias=bias)
    layer += linear("attention.dense", h, h, "row", Part.ATTENTION, sizes.heads, bias=bias)
    layer += plain_mlp(h, fields.size("intermediate_size"), ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"))
    return decoder(
        fields,
        b,
        alike(b, layer),
        embeddings=(embedding("gpt_neox.embed_in.weight", b.vocab, h),),
        final=norm("gpt_neox.final_layer_norm", h, True).tensors,
        activation="gelu",
        dropout=fields.number("hidden_dropout"),
    )


def gptj(fields: Fields) -> ModelSpec:
    """One norm feeds attention and MLP in parallel; no attention bias; the head has a bias."""
    b = base(fields)
    h = b.hidden
    sizes = full_heads(fields, h, "n_head", "num_attention_heads")
    layer = layer_norms(h, "ln_1")
    layer += gqa(h, sizes, prefix="attn.", output="out_proj")
    layer += plain_mlp(h, fields.size("n_inner", default=4 * h), ("mlp.fc_in", "mlp.fc_out"))
    return decoder(
        fields,
        b,
        alike(b, layer),
        embeddings=(embedding("transformer.wte.weight", b.vocab, h),),
        final=norm("transformer.ln_f", h, True).tensors,
        head_tensors=head(b.vocab, h, bias=True),
        activation="gelu_new",
        dropout=fields.number("resid_pdrop"),
    )


def falcon(fields: Fields) -> ModelSpec:
    """Falcon 7B (one KV head), 40B and 180B (`new_decoder_architecture`: grouped KV heads and two norms)."""
    b = base(fields, tied=True)
    h, bias, new = b.hidden, fields.flag("bias"), fields.flag("new_decoder_architecture")
    sizes = full_heads(fields, h, "num_attention_heads", "n_head")
    old_kv = 1 if fields.flag("multi_query", default=True) else sizes.heads
    kv = fields.size("num_kv_heads", default=sizes.heads) if new else old_kv
    parallel = fields.flag("parallel_attn", default=True)
    norms = fields.size("num_ln_in_parallel_attn", default=2 if new else 1)
    names = ("ln_attn", "ln_mlp") if new and norms == 2 else ("input_layernorm",)
    layer = layer_norms(h, *names)
    if not parallel:
        layer += layer_norms(h, "post_attention_layernorm")
    layer += fused_qkv("self_attention.query_key_value", h, replace(sizes, kv_heads=kv), bias=bias)
    layer += linear("self_attention.dense", h, h, "row", Part.ATTENTION, sizes.heads, bias=bias)
    width = fields.size("ffn_hidden_size", default=4 * h)
    layer += plain_mlp(h, width, ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"), bias=bias)
    return decoder(
        fields,
        b,
        alike(b, layer),
        embeddings=(embedding("transformer.word_embeddings.weight", b.vocab, h),),
        final=norm("transformer.ln_f", h, True).tensors,
        activation="gelu",
        dropout=fields.number("hidden_dropout"),
    )


def mpt(fields: Fields) -> ModelSpec:
    """MPT: no biases, ALiBi, fused q, k, v, tied head."""
    b = base(fields, tied=True)
    h = b.hidden
    sizes = full_heads(fields, h, "n_heads")
    if fields.size("expansion_ratio", default=4) != 4:
        raise fields.error("expansion_ratio other than 4 is not read (transformers' MPT has none other)")
    width = 4 * h
    layer = layer_norms(h, "norm_1", "norm_2", bias=False)
    layer += fused_qkv("attn.Wqkv", h, sizes)
    layer += linear("attn.out_proj", h, h, "row", Part.ATTENTION, sizes.heads)
    layer += plain_mlp(h, width, ("ffn.up_proj", "ffn.down_proj"), bias=False)
    return decoder(
        fields,
        b,
        alike(b, layer),
        embeddings=(embedding("transformer.wte.weight", b.vocab, h),),
        final=norm("transformer.norm_f", h).tensors,
        activation="gelu",
        dropout=fields.number("resid_pdrop"),
    )


def nemotron(fields: Fields) -> ModelSpec:
    """Nemotron-4: squared ReLU, plain MLP, LayerNorm with bias, grouped KV heads, untied."""
    b = base(fields)
    h, bias = b.hidden, fields.flag("attention_bias")
    sizes = heads(fields, h)
    layer = gqa(h, sizes, qkv_bias=bias, output_bias=bias)
    names = ("mlp.up_proj", "mlp.down_proj")
    layer += plain_mlp(h, fields.size("intermediate_size"), names, bias=fields.flag("mlp_bias"))
    layer += layer_norms(h, "input_layernorm", "post_attention_layernorm")
    return decoder(
        fields,
        b,
        alike(b, layer),
        final=norm("model.norm", h, True).tensors,
        activation="relu2",
    )
