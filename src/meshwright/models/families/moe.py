"""Mixtures of experts over grouped-query attention.

Mixtral, Qwen2-MoE, Qwen3-MoE, gpt-oss, GLM-4.5, MiniMax-M2, Llama 4, MiMo-V2.
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.models.assemble import decoder, layer_kinds, with_mtp
from meshwright.models.blocks import (
    Block,
    ExpertSizes,
    Heads,
    gated_mlp,
    gqa,
    linear,
    norm,
    routed_experts,
    router,
    vector,
    with_shared_expert,
)
from meshwright.models.families.common import (
    FULL,
    SLIDING,
    attention_types,
    base,
    dense_or_expert,
    heads,
    mtp_depth,
    window_of,
)
from meshwright.models.families.llama import head_norms, qwen_attention_types, two_norms
from meshwright.models.fields import Fields
from meshwright.models.spec import Attention, ModelSpec, Part

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def expert_sizes(fields: Fields, width: str = "moe_intermediate_size", *, gated: bool = True) -> ExpertSizes:
    """Number, top-k and width of the routed experts."""
    experts = fields.size(*EXPERTS)
    top_k = fields.size("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk")
    if top_k > experts:
        raise fields.error(f"num_experts_per_tok {top_k} is more than the {experts} experts")
    return ExpertSizes(experts, top_k, fields.size(width), gated)


def mixtral(fields: Fields) -> ModelSpec:
    b = base(fields)
    sizes = heads(fields, b.hidden, kv_heads=8)
    experts = expert_sizes(fields, "intermediate_size")
    window = fields.whole("sliding_window", most=10**9)
    layer = gqa(b.hidden, sizes, window=window) + router("mlp.gate", b.hidden, experts.experts)
    layer += routed_experts(b.hidden, experts) + two_norms(b.hidden)
    kinds = layer_kinds(["moe"] * b.layers, lambda _: layer)
    return decoder(fields, b, kinds)


def qwen_sparse(fields: Fields, layers: int) -> list[bool]:
    """Expert layers: every `decoder_sparse_step`-th one, except those that `mlp_only_layers` names."""
    step = fields.size("decoder_sparse_step", default=1)
    dense = set(fields.wholes("mlp_only_layers") or ())
    return [i not in dense and (i + 1) % step == 0 for i in range(layers)]


def qwen_shared_expert(fields: Fields, hidden: int) -> tuple[Block, int]:
    """The shared expert of Qwen2-MoE and Qwen3.5 with its own sigmoid gate."""
    width = fields.size("shared_expert_intermediate_size")
    block = gated_mlp(hidden, width, prefix="mlp.shared_expert.", part=Part.SHARED_EXPERT)
    return block + linear("mlp.shared_expert_gate", hidden, 1, "none", Part.ROUTER), width


def qwen2_moe(fields: Fields) -> ModelSpec:
    b = base(fields)
    sizes, experts = heads(fields, b.hidden), expert_sizes(fields)
    bias = fields.flag("qkv_bias", default=True)

    def layer(key: tuple[str, str]) -> Block:
        block = gqa(b.hidden, sizes, qkv_bias=bias, window=window_of(fields, key[0])) + two_norms(b.hidden)
        if key[1] == "dense":
            return block + gated_mlp(b.hidden, fields.size("intermediate_size"))
        block += router("mlp.gate", b.hidden, experts.experts) + routed_experts(b.hidden, experts)
        return with_shared_expert(block, *qwen_shared_expert(fields, b.hidden))

    sparse = ["moe" if s else "dense" for s in qwen_sparse(fields, b.layers)]
    keys = list(zip(qwen_attention_types(fields, b.layers), sparse, strict=True))
    return decoder(fields, b, layer_kinds(keys, layer))


def qwen3_moe(fields: Fields) -> ModelSpec:
    b, bias = base(fields), fields.flag("attention_bias")
    sizes, experts = heads(fields, b.hidden), expert_sizes(fields)
    window = fields.whole("sliding_window", most=10**9) if fields.flag("use_sliding_window") else None

    def layer(kind: str) -> Block:
        block = gqa(b.hidden, sizes, qkv_bias=bias, output_bias=bias, window=window) + head_norms(sizes)
        block += two_norms(b.hidden)
        if kind == "dense":
            return block + gated_mlp(b.hidden, fields.size("intermediate_size"))
        return block + router("mlp.gate", b.hidden, experts.experts) + routed_experts(b.hidden, experts)

    keys = ["moe" if s else "dense" for s in qwen_sparse(fields, b.layers)]
    return decoder(fields, b, layer_kinds(keys, layer))


def gpt_oss(fields: Fields) -> ModelSpec:
    """Alternating sliding and full attention with sinks; biases on every product; clamped gated experts."""
    b, bias = base(fields), fields.flag("attention_bias", default=True)
    sizes, experts = heads(fields, b.hidden, head_dim=64), expert_sizes(fields, "intermediate_size")

    def layer(kind: str) -> Block:
        block = gqa(b.hidden, sizes, qkv_bias=bias, output_bias=bias, window=window_of(fields, kind))
        block += vector("self_attn.sinks", sizes.heads, Part.ATTENTION, sizes.heads)
        block += router("mlp.router", b.hidden, experts.experts, bias=True)
        return block + routed_experts(b.hidden, experts, transposed=True, bias=True) + two_norms(b.hidden)

    kinds = layer_kinds(attention_types(fields, b.layers, every=2), layer)
    return decoder(fields, b, kinds)


def deepseek_moe_block(fields: Fields, hidden: int, experts: ExpertSizes) -> Block:
    """Routed experts plus `n_shared_experts` always-on ones fused into one MLP (DeepSeekMoE, arXiv 2401.06066)."""
    block = router("mlp.gate", hidden, experts.experts) + routed_experts(hidden, experts)
    shared = fields.size("n_shared_experts", "num_shared_experts", default=0, least=0) * experts.width
    if shared == 0:
        return block
    mlp = gated_mlp(hidden, shared, prefix="mlp.shared_experts.", part=Part.SHARED_EXPERT)
    return with_shared_expert(block, mlp, shared)


def glm4_moe(fields: Fields) -> ModelSpec:
    """GLM-4.5: q, k, v biases, optional q and k norms, leading dense layers."""
    b, bias = base(fields), fields.flag("attention_bias")
    sizes, experts = heads(fields, b.hidden), expert_sizes(fields)

    def layer(kind: str) -> Block:
        block = gqa(b.hidden, sizes, qkv_bias=bias) + two_norms(b.hidden)
        if fields.flag("use_qk_norm"):
            block += head_norms(sizes)
        if kind == "dense":
            return block + gated_mlp(b.hidden, fields.size("intermediate_size"))
        return block + deepseek_moe_block(fields, b.hidden, experts)

    sparse = dense_or_expert(fields, b.layers, fields.size("first_k_dense_replace", default=1, least=0))
    kinds = layer_kinds(["moe" if s else "dense" for s in sparse], layer)
    spec = decoder(fields, b, kinds)
    return with_mtp(spec, mtp_depth(fields))


def minimax_m2(fields: Fields) -> ModelSpec:
    """Norms over all q and all k heads together; every layer has experts."""
    b = base(fields)
    sizes, experts = heads(fields, b.hidden, kv_heads=8), expert_sizes(fields, "intermediate_size")
    block = gqa(b.hidden, sizes)
    for name, count in (("q_norm", sizes.heads), ("k_norm", sizes.kv_heads)):
        block += norm(f"self_attn.{name}", count * sizes.head_dim, over_hidden=False, units=count)
    block += router("mlp.gate", b.hidden, experts.experts) + routed_experts(b.hidden, experts) + two_norms(b.hidden)
    kinds = layer_kinds(["moe"] * b.layers, lambda _: block)
    spec = decoder(fields, b, kinds)
    return with_mtp(spec, mtp_depth(fields, "num_mtp_modules") if fields.flag("use_mtp") else 0)


def minimax_m3(fields: Fields) -> ModelSpec:
    """Block-sparse attention on most layers: an indexer of a few heads picks blocks of keys; a shared expert."""
    b = base(fields)
    sizes, experts = heads(fields, b.hidden), expert_sizes(fields, "intermediate_size")
    sparse = fields.section("sparse_attention_config") or Fields({}, f"{fields.label}: sparse_attention_config")
    flags = sparse.wholes("sparse_attention_freq")
    fields.per_layer("sparse_attention_freq", flags, b.layers)
    flags = [0] * b.layers if flags is None else flags
    index = Heads(sparse.size("sparse_num_index_heads", default=4), 1, sparse.size("sparse_index_dim", default=128))
    picked = sparse.size("sparse_topk_blocks", default=16) * sparse.size("sparse_block_size", default=128)
    shared = fields.size("shared_intermediate_size") * fields.size("n_shared_experts", default=1, least=0)

    def layer(key: tuple[str, str]) -> Block:
        block = gqa(b.hidden, sizes) + head_norms(sizes) + two_norms(b.hidden)
        if key[0] == "sparse" and isinstance(block.mixer, Attention):
            block = replace(block, mixer=indexed(block.mixer, index, picked)) + block_indexer(b.hidden, index)
        if key[1] == "dense":
            return block + gated_mlp(b.hidden, fields.size("dense_intermediate_size"), fused=True)
        block += router("mlp.gate", b.hidden, experts.experts) + routed_experts(b.hidden, experts)
        if shared == 0:
            return block
        mlp = gated_mlp(b.hidden, shared, prefix="mlp.shared_experts.", part=Part.SHARED_EXPERT, fused=True)
        return with_shared_expert(block, mlp, shared)

    moe = ["moe" if s else "dense" for s in dense_or_expert(fields, b.layers, 0)]
    keys = list(zip(["sparse" if f else FULL for f in flags], moe, strict=True))
    spec = decoder(fields, b, layer_kinds(keys, layer))
    return with_mtp(spec, mtp_depth(fields))


def indexed(attention: Attention, index: Heads, picked: int) -> Attention:
    """Attention over the keys that an indexer picks; the indexer's key is cached beside."""
    return replace(
        attention,
        top_k_keys=picked,
        indexer_heads=index.heads,
        indexer_dim=index.head_dim,
        kv_cache_elements=attention.kv_cache_elements + index.head_dim,
    )


def block_indexer(hidden: int, index: Heads) -> Block:
    """The indexer's own q heads and single key, normed per head; replicated over tp."""
    prefix, part = "self_attn.indexer.", Part.ATTENTION
    block = linear(f"{prefix}q_proj", hidden, index.heads * index.head_dim, "none", part)
    block += linear(f"{prefix}k_proj", hidden, index.head_dim, "none", part)
    for name in ("q_norm", "k_norm"):
        block += norm(f"{prefix}{name}", index.head_dim, over_hidden=False)
    return block


def step3p7(fields: Fields) -> ModelSpec:
    """Step-3.7: q and k norms, a gate per head on the attention output, three sliding layers to a full one."""
    b, bias = base(fields), fields.flag("attention_bias")
    full, experts = heads(fields, b.hidden), expert_sizes(fields)
    sliding_heads = fields.size("num_sliding_attention_heads", default=full.heads)
    shared = fields.size("share_expert_dim", default=experts.width)

    def layer(key: tuple[str, str]) -> Block:
        sizes = replace(full, heads=sliding_heads) if key[0] == SLIDING else full
        block = gqa(b.hidden, sizes, qkv_bias=bias, output_bias=bias, window=window_of(fields, key[0]))
        block += head_norms(sizes) + two_norms(b.hidden)
        block += linear("self_attn.g_proj", b.hidden, sizes.heads, "column", Part.ATTENTION, sizes.heads)
        if key[1] == "dense":
            return block + gated_mlp(b.hidden, fields.size("intermediate_size"))
        block += router("mlp.gate", b.hidden, experts.experts) + routed_experts(b.hidden, experts)
        mlp = gated_mlp(b.hidden, shared, prefix="mlp.shared_experts.", part=Part.SHARED_EXPERT)
        return with_shared_expert(block, mlp, shared)

    moe = ["moe" if s else "dense" for s in dense_or_expert(fields, b.layers, 3)]
    keys = list(zip(attention_types(fields, b.layers), moe, strict=True))
    spec = decoder(fields, b, layer_kinds(keys, layer))
    return with_mtp(spec, mtp_depth(fields))


def llama4(fields: Fields) -> ModelSpec:
    """Chunked attention in three layers of four (the fourth is full, without positions); experts every few layers."""
    b, bias = base(fields), fields.flag("attention_bias")
    sizes = heads(fields, b.hidden)
    experts = expert_sizes(fields, "intermediate_size")
    step = fields.size("interleave_moe_layer_step", default=1)
    named = fields.wholes("moe_layers")
    sparse = set(range(step - 1, b.layers, step)) if named is None else set(named)
    no_rope = fields.wholes("no_rope_layers") or []  # 1: rotary and chunked, 0: full
    if no_rope:
        fields.per_layer("no_rope_layers", no_rope, b.layers)
    else:
        interval = fields.size("no_rope_layer_interval", default=4)
        no_rope = [int((i + 1) % interval != 0) for i in range(b.layers)]

    def layer(key: tuple[str, str]) -> Block:
        window = fields.size("attention_chunk_size", default=8192, most=10**9) if key[0] == "chunked" else None
        block = gqa(b.hidden, sizes, qkv_bias=bias, output_bias=bias, window=window, chunked=window is not None)
        block += two_norms(b.hidden)
        if key[1] == "dense":
            return block + gated_mlp(b.hidden, fields.size("intermediate_size_mlp"), prefix="feed_forward.")
        block += routed_experts(b.hidden, experts, prefix="feed_forward.experts.", transposed=True)
        block += router("feed_forward.router", b.hidden, experts.experts)
        shared = gated_mlp(b.hidden, experts.width, prefix="feed_forward.shared_expert.", part=Part.SHARED_EXPERT)
        return with_shared_expert(block, shared, experts.width)

    keys = [("chunked" if no_rope[i] else FULL, "moe" if i in sparse else "dense") for i in range(b.layers)]
    return decoder(fields, b, layer_kinds(keys, layer))


def mimo_v2(fields: Fields) -> ModelSpec:
    """Full and sliding layers with their own head counts; value heads narrower than key heads; sinks when sliding."""
    b, bias = base(fields), fields.flag("attention_bias")
    experts = expert_sizes(fields)
    pattern = fields.wholes("hybrid_layer_pattern")  # 1: sliding
    fields.per_layer("hybrid_layer_pattern", pattern, b.layers)
    if pattern is None and "layer_types" not in fields.values:
        raise fields.error("hybrid_layer_pattern is missing (1 for a sliding layer, 0 for a full one)")
    types = attention_types(fields, b.layers) if pattern is None else [SLIDING if p else FULL for p in pattern]

    def layer(key: tuple[str, str]) -> Block:
        sliding = key[0] == SLIDING
        prefix = "swa_" if sliding else ""
        sizes = replace(
            heads(Fields({k.removeprefix(prefix): v for k, v in fields.values.items()}, fields.label), b.hidden),
            v_dim=fields.size(f"{prefix}v_head_dim"),
        )
        block = gqa(b.hidden, sizes, qkv_bias=bias, window=window_of(fields, key[0])) + two_norms(b.hidden)
        if fields.flag(f"add_{'swa' if sliding else 'full'}_attention_sink_bias", default=sliding):
            block += vector("self_attn.sinks", sizes.heads, Part.ATTENTION, sizes.heads)
        if key[1] == "dense":
            return block + gated_mlp(b.hidden, fields.size("intermediate_size"))
        return block + deepseek_moe_block(fields, b.hidden, experts)

    sparse = ["moe" if s else "dense" for s in dense_or_expert(fields, b.layers, 1)]
    keys = list(zip(types, sparse, strict=True))
    return decoder(fields, b, layer_kinds(keys, layer))
