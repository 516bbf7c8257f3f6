"""Multi-head latent attention with experts: DeepSeek-V2, DeepSeek-V3 (and R1, Moonlight), Kimi-K2, GLM-5."""

from __future__ import annotations

from dataclasses import replace

from meshwright.models.assemble import decoder, layer_kinds, with_mtp
from meshwright.models.blocks import Block, MlaSizes, gated_mlp, linear, mla, norm
from meshwright.models.families.common import base, dense_or_expert, mtp_depth
from meshwright.models.families.llama import two_norms
from meshwright.models.families.moe import deepseek_moe_block, expert_sizes
from meshwright.models.fields import Fields
from meshwright.models.spec import Attention, ModelSpec, Part


def mla_sizes(fields: Fields) -> MlaSizes:
    return MlaSizes(
        fields.size("num_attention_heads"),
        fields.whole("q_lora_rank"),
        fields.size("kv_lora_rank"),
        fields.size("qk_nope_head_dim"),
        fields.size("qk_rope_head_dim"),
        fields.size("v_head_dim"),
    )


def deepseek(fields: Fields) -> ModelSpec:
    """DeepSeek-V2 and V3: leading dense layers, then routed and shared experts; V3 adds prediction modules."""
    b, bias = base(fields), fields.flag("attention_bias")
    attention, experts = mla(b.hidden, mla_sizes(fields), bias=bias), expert_sizes(fields)

    def layer(kind: str) -> Block:
        block = attention + two_norms(b.hidden)
        if kind == "dense":
            return block + gated_mlp(b.hidden, fields.size("intermediate_size"))
        return block + deepseek_moe_block(fields, b.hidden, experts)

    sparse = dense_or_expert(fields, b.layers, fields.size("first_k_dense_replace", default=0, least=0))
    kinds = layer_kinds(["moe" if s else "dense" for s in sparse], layer)
    spec = decoder(fields, b, kinds)
    return with_mtp(spec, mtp_depth(fields))


def indexer(fields: Fields, hidden: int, q_rank: int) -> Block:
    """The lightning indexer of DeepSeek sparse attention (DeepSeek-V3.2-Exp report, eq. 1): replicated over tp."""
    count, dim = fields.size("index_n_heads"), fields.size("index_head_dim")
    prefix, part = "self_attn.indexer.", Part.ATTENTION
    block = linear(f"{prefix}wq_b", q_rank, count * dim, "none", part)
    block += linear(f"{prefix}wk", hidden, dim, "none", part) + norm(f"{prefix}k_norm", dim, True, over_hidden=False)
    return block + linear(f"{prefix}weights_proj", hidden, count, "none", part)


def sparse_mla(fields: Fields, hidden: int, *, own_indexer: bool) -> Block:
    """Latent attention over the `index_topk` keys that an indexer picks; without `own_indexer` the layer uses the
    picks of an earlier layer (GLM-5.2)."""
    sizes = mla_sizes(fields)
    block = mla(hidden, sizes, bias=fields.flag("attention_bias"))
    if sizes.q_rank is None or not isinstance(block.mixer, Attention):
        raise fields.error("sparse attention needs q_lora_rank")
    mixer = replace(block.mixer, top_k_keys=fields.size("index_topk"))
    if own_indexer:
        dim = fields.size("index_head_dim")
        cached = mixer.kv_cache_elements + dim
        count = fields.size("index_n_heads")
        mixer = replace(mixer, indexer_heads=count, indexer_dim=dim, kv_cache_elements=cached)
        block += indexer(fields, hidden, sizes.q_rank)
    return replace(block, mixer=mixer)


def glm_moe_dsa(fields: Fields) -> ModelSpec:
    """GLM-5: DeepSeek-V3's layer with sparse attention. GLM-5.2 shares one indexer's picks among four layers."""
    b, experts = base(fields), expert_sizes(fields)
    types = fields.texts("indexer_types") or ["full"] * b.layers
    fields.per_layer("indexer_types", types, b.layers)

    def layer(key: tuple[str, str]) -> Block:
        block = sparse_mla(fields, b.hidden, own_indexer=key[0] != "shared") + two_norms(b.hidden)
        if key[1] == "dense":
            return block + gated_mlp(b.hidden, fields.size("intermediate_size"))
        return block + deepseek_moe_block(fields, b.hidden, experts)

    sparse = dense_or_expert(fields, b.layers, fields.size("first_k_dense_replace", default=3, least=0))
    keys = list(zip(types, ["moe" if s else "dense" for s in sparse], strict=True))
    spec = decoder(fields, b, layer_kinds(keys, layer))
    return with_mtp(spec, mtp_depth(fields))
