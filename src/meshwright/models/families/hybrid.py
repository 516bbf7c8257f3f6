"""Hybrids: layers of linear attention or state space between layers of softmax attention.

Qwen3-Next and Qwen3.5 (gated delta net), Nemotron-H and Nemotron-3 (Mamba-2), Kimi-Linear and Kimi-K3 (Kimi delta
attention beside MLA).
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.models.assemble import decoder, embedding, layer_kinds, with_mtp
from meshwright.models.blocks import (
    Block,
    ExpertSizes,
    gated_mlp,
    gqa,
    linear,
    mla,
    norm,
    plain_mlp,
    routed_experts,
    router,
    vector,
    with_shared_expert,
)
from meshwright.models.families.common import FULL, Base, base, dense_or_expert, heads, mtp_depth
from meshwright.models.families.llama import head_norms, two_norms
from meshwright.models.families.mla import mla_sizes
from meshwright.models.families.moe import expert_sizes, qwen_shared_expert
from meshwright.models.fields import Fields, shown
from meshwright.models.spec import LinearMixer, ModelSpec, Part, TensorSpec

LINEAR = "linear_attention"
DELTA_CHUNK = 64
"""Tokens per chunk of the delta-rule kernels (flash-linear-attention's default for gated delta net and KDA)."""


def short_convolution(name: str, channels: int, kernel: int, units: int, *, bias: bool = False) -> Block:
    """A depthwise convolution over the last `kernel` tokens of each channel."""
    tensors = [TensorSpec(f"{name}.weight", (channels, 1, kernel), Part.ATTENTION, units, split_dim=0)]
    if bias:
        tensors.append(TensorSpec(f"{name}.bias", (channels,), Part.ATTENTION, units, split_dim=0))
    return Block(tuple(tensors))


def state_bytes(fields: Fields, *names: str) -> int:
    return 4 if fields.text(*names) == "float32" else 2


def gated_delta_net(fields: Fields, hidden: int, *, fused: bool) -> Block:
    """Qwen3-Next's mixer (Yang et al. 2024, arXiv 2412.06464). `fused`: q, k, v, z are one tensor (Qwen3-Next), else
    qkv, z, b, a are apart (Qwen3.5). Heads are shared out by key heads, each with its value heads."""
    key_heads, value_heads = fields.size("linear_num_key_heads"), fields.size("linear_num_value_heads")
    if value_heads % key_heads:
        raise fields.error(f"linear_num_value_heads {value_heads} is not a multiple of the {key_heads} key heads")
    key_dim, value_dim = fields.size("linear_key_head_dim"), fields.size("linear_value_head_dim")
    keys, values = key_heads * key_dim, value_heads * value_dim
    kernel, part, p = fields.size("linear_conv_kernel_dim", default=4), Part.ATTENTION, "linear_attn."
    block = vector(f"{p}dt_bias", value_heads, part, value_heads) + vector(f"{p}A_log", value_heads, part, value_heads)
    block += short_convolution(f"{p}conv1d", 2 * keys + values, kernel, key_heads)
    if fused:
        block += linear(f"{p}in_proj_qkvz", hidden, 2 * keys + 2 * values, "column", part, key_heads)
        block += linear(f"{p}in_proj_ba", hidden, 2 * value_heads, "column", part, key_heads)
    else:
        block += linear(f"{p}in_proj_qkv", hidden, 2 * keys + values, "column", part, key_heads)
        block += linear(f"{p}in_proj_z", hidden, values, "column", part, value_heads)
        block += linear(f"{p}in_proj_b", hidden, value_heads, "column", part, value_heads)
        block += linear(f"{p}in_proj_a", hidden, value_heads, "column", part, value_heads)
    block += norm(f"{p}norm", value_dim, over_hidden=False)
    block += linear(f"{p}out_proj", values, hidden, "row", part, value_heads)
    mixer = LinearMixer(
        "gated_delta_net",
        value_heads,
        key_dim,
        value_dim,
        DELTA_CHUNK,
        2 * keys + values,
        kernel,
        state_bytes(fields, "mamba_ssm_dtype"),
    )
    return replace(block, mixer=mixer)


def qwen3_next(fields: Fields) -> ModelSpec:
    return _qwen_hybrid(fields, fused=True)


def qwen3_5(fields: Fields) -> ModelSpec:
    return _qwen_hybrid(fields, fused=False)


def _qwen_hybrid(fields: Fields, *, fused: bool) -> ModelSpec:
    """Three layers of gated delta net to one of gated softmax attention; experts with a gated shared one, or dense."""
    b, bias = base(fields), fields.flag("attention_bias")
    sizes = heads(fields, b.hidden, head_dim=256)
    types = fields.texts("layer_types")
    if types is None:
        every = fields.size("full_attention_interval", default=4)
        types = [FULL if (i + 1) % every == 0 else LINEAR for i in range(b.layers)]
    fields.per_layer("layer_types", types, b.layers)
    dense = set(fields.wholes("mlp_only_layers") or ())
    has_experts = fields.whole("num_experts", least=0) not in (None, 0)

    def layer(key: tuple[str, str]) -> Block:
        if key[0] == FULL:
            block = gqa(b.hidden, sizes, qkv_bias=bias, output_bias=bias, gated_output=True) + head_norms(sizes)
        elif key[0] == LINEAR:
            block = gated_delta_net(fields, b.hidden, fused=fused)
        else:
            raise fields.error(f"layer_types holds {shown(key[0])}; use {LINEAR} or {FULL}")
        block += two_norms(b.hidden)
        if key[1] == "dense":
            return block + gated_mlp(b.hidden, fields.size("intermediate_size"))
        experts = expert_sizes(fields)
        block += router("mlp.gate", b.hidden, experts.experts) + routed_experts(b.hidden, experts)
        return with_shared_expert(block, *qwen_shared_expert(fields, b.hidden))

    keys = [(kind, "moe" if has_experts and i not in dense else "dense") for i, kind in enumerate(types)]
    spec = decoder(fields, b, layer_kinds(keys, layer))
    return with_mtp(spec, mtp_depth(fields, "mtp_num_hidden_layers"), layer((FULL, keys[-1][1])).kind("mtp"))


def mamba2(fields: Fields, hidden: int) -> Block:
    """A Mamba-2 block (Dao and Gu 2024, arXiv 2405.21060): gate z, input x, B and C per group, one step per head."""
    count, dim = fields.size("mamba_num_heads"), fields.size("mamba_head_dim")
    groups, state = fields.size("n_groups"), fields.size("ssm_state_size")
    inner, shared, part = count * dim, 2 * groups * state, Part.ATTENTION
    bias = fields.flag("use_bias")
    kernel = fields.size("conv_kernel", default=4)
    block = Block()
    for name in ("dt_bias", "A_log", "D"):
        block += vector(f"mixer.{name}", count, part, count)
    block += short_convolution(
        "mixer.conv1d", inner + shared, kernel, groups, bias=fields.flag("use_conv_bias", default=True)
    )
    fused = ((2 * inner, count), (shared, groups), (count, count))
    block += linear("mixer.in_proj", hidden, 2 * inner + shared + count, "column", part, fused=fused, bias=bias)
    block += norm("mixer.norm", inner, over_hidden=False, units=count)
    block += linear("mixer.out_proj", inner, hidden, "row", part, count, bias=bias)
    mixer = LinearMixer(
        "mamba2",
        count,
        state,
        dim,
        fields.size("chunk_size", default=128),
        inner + shared,
        kernel,
        state_bytes(fields, "mamba_ssm_cache_dtype"),
        delta_rule=False,
    )
    return replace(block, mixer=mixer)


NEMOTRON_LETTERS = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
NEMOTRON_NAMES = {"linear_attention": "mamba", "full_attention": "attention"}


def nemotron_layers(fields: Fields) -> list[str]:
    """Per block 'mamba', 'attention', 'mlp' or 'moe', from `layers_block_type` or the letters of
    `hybrid_override_pattern`."""
    names = fields.texts("layers_block_type") or fields.texts("layer_types")
    if names is None:
        pattern = fields.text("hybrid_override_pattern")
        if not pattern:
            raise fields.error("layers_block_type or hybrid_override_pattern is missing")
        if len(pattern) > 10_000 or set(pattern) - set(NEMOTRON_LETTERS):
            raise fields.error(f"hybrid_override_pattern may hold only {' '.join(NEMOTRON_LETTERS)}")
        names = [NEMOTRON_LETTERS[letter] for letter in pattern]
    names = [NEMOTRON_NAMES.get(name, name) for name in names]
    unknown = sorted(set(names) - set(NEMOTRON_LETTERS.values()))
    if unknown:
        raise fields.error(f"layers_block_type holds {shown(unknown[0])}; use mamba, attention, mlp or moe")
    return names


def nemotron_experts(fields: Fields, hidden: int) -> Block:
    """Plain (not gated) experts, in a narrower latent space where `moe_latent_size` says so, and a shared one."""
    latent = fields.whole("moe_latent_size")
    experts = expert_sizes(fields, gated=False)
    experts = ExpertSizes(experts.experts, experts.top_k, experts.width, gated=False, inner=latent)
    block = routed_experts(hidden, experts, prefix="mixer.experts.") + router("mixer.gate", hidden, experts.experts)
    width = fields.size("moe_shared_expert_intermediate_size")
    names = ("mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj")
    shared = plain_mlp(hidden, width, names, bias=fields.flag("mlp_bias"), part=Part.SHARED_EXPERT)
    block = with_shared_expert(block, shared, width, gated=False)
    if latent:
        block += linear("mixer.fc1_latent_proj", hidden, latent, "none", Part.SHARED_EXPERT)
        block += linear("mixer.fc2_latent_proj", latent, hidden, "none", Part.SHARED_EXPERT)
    return block


def nemotron_h(fields: Fields) -> ModelSpec:
    """Every block is one norm and one of Mamba-2, attention, MLP (squared ReLU) or experts."""
    names = nemotron_layers(fields)
    b = Base(fields.size("hidden_size"), len(names), fields.size("vocab_size"), fields.flag("tie_word_embeddings"))

    def layer(kind: str) -> Block:
        block = norm("norm", b.hidden)
        if kind == "mamba":
            return block + mamba2(fields, b.hidden)
        if kind == "attention":
            dim = fields.size("head_dim", "attention_head_dim", default=128)
            sizes = replace(heads(fields, b.hidden, head_dim=dim), head_dim=dim)
            return block + gqa(b.hidden, sizes, prefix="mixer.")
        if kind == "moe":
            return block + nemotron_experts(fields, b.hidden)
        mlp_names = ("mixer.up_proj", "mixer.down_proj")
        width = fields.size("intermediate_size")
        return block + plain_mlp(b.hidden, width, mlp_names, bias=fields.flag("mlp_bias"))

    spec = decoder(
        fields,
        b,
        layer_kinds(names, layer),
        embeddings=(embedding("model.embeddings.weight", b.vocab, b.hidden),),
        final=norm("model.norm_f", b.hidden).tensors,
        activation="relu2",
    )
    depth = mtp_depth(fields)
    return with_mtp(spec, depth, (layer("attention") + layer("moe")).kind("mtp")) if depth else spec


def kimi_delta_attention(fields: Fields, hidden: int) -> Block:
    """KDA (Kimi Linear, arXiv 2510.26692): a delta rule with a decay per channel, behind a low-rank gate;
    `use_full_rank_gate` (Kimi-K3) makes the output gate a full projection."""
    linear_config = fields.section("linear_attn_config") or fields
    count = linear_config.size("num_heads", "linear_num_heads")
    dim = linear_config.size("head_dim", "linear_head_dim")
    kernel = linear_config.size("short_conv_kernel_size", "linear_conv_kernel_dim", default=4)
    inner, part, p = count * dim, Part.ATTENTION, "self_attn."
    block = Block()
    for name in ("q_proj", "k_proj", "v_proj"):
        block += linear(f"{p}{name}", hidden, inner, "column", part, count)
    block += short_convolution(f"{p}conv1d", 3 * inner, kernel, count)
    block += vector(f"{p}forget_gate.dt_bias", inner, part, count)
    block += Block((TensorSpec(f"{p}forget_gate.A_log", (1, 1, count, 1), part, count, split_dim=2),))
    block += linear(f"{p}forget_gate.f_a_proj", hidden, dim, "none", part)
    block += linear(f"{p}forget_gate.f_b_proj", dim, inner, "column", part, count)
    block += linear(f"{p}b_proj", hidden, count, "column", part, count)
    if linear_config.flag("use_full_rank_gate"):
        block += linear(f"{p}g_proj", hidden, inner, "column", part, count)
    else:
        block += linear(f"{p}g_a_proj", hidden, dim, "none", part)
        block += linear(f"{p}g_b_proj", dim, inner, "column", part, count)
    block += norm(f"{p}o_norm", dim, over_hidden=False) + linear(f"{p}o_proj", inner, hidden, "row", part, count)
    return replace(block, mixer=LinearMixer("kimi_delta_attention", count, dim, dim, DELTA_CHUNK, 3 * inner, kernel))


def kimi_mixer_types(fields: Fields, layers: int) -> list[str]:
    """Per layer full or linear attention; the lists of `linear_attn_config` count layers from 1."""
    config = fields.section("linear_attn_config")
    full = config.wholes("full_attn_layers", least=1) if config else None
    if config is None or full is None:
        types = fields.texts("layer_types")
        if types is None:
            raise fields.error("linear_attn_config.full_attn_layers or layer_types is missing")
        fields.per_layer("layer_types", types, layers)
        return types
    linear_layers = config.wholes("kda_layers", least=1) or []
    if sorted(full + linear_layers) != list(range(1, layers + 1)):
        raise fields.error(f"full_attn_layers and kda_layers must name each of the {layers} layers once")
    return [FULL if i + 1 in set(full) else LINEAR for i in range(layers)]


def kimi_experts(fields: Fields, hidden: int) -> Block:
    """Experts of Kimi-Linear; Kimi-K3's work in a latent space between two shared projections and a norm."""
    latent = fields.whole("routed_expert_hidden_size")
    sizes = replace(expert_sizes(fields), inner=latent)
    block = router("mlp.gate", hidden, sizes.experts) + routed_experts(hidden, sizes)
    width = fields.size("num_shared_experts", "n_shared_experts", default=0, least=0) * sizes.width
    if width:
        mlp = gated_mlp(hidden, width, prefix="mlp.shared_experts.", part=Part.SHARED_EXPERT)
        block = with_shared_expert(block, mlp, width)
    if latent:
        block += linear("mlp.routed_expert_down_proj", hidden, latent, "none", Part.SHARED_EXPERT)
        block += linear("mlp.routed_expert_up_proj", latent, hidden, "none", Part.SHARED_EXPERT)
        if fields.flag("latent_moe_use_norm"):
            block += norm("mlp.routed_expert_norm", latent, over_hidden=False)
    return block


def attention_residual(hidden: int, *names: str) -> Block:
    """Attention residuals (Kimi-K3, arXiv 2607.24653): a norm and one score vector where earlier blocks are mixed."""
    block = Block()
    for name in names:
        block += norm(f"{name}_norm", hidden) + linear(f"{name}_proj", hidden, 1, "none", Part.ATTENTION)
    return block


def kimi_linear(fields: Fields) -> ModelSpec:
    b = base(fields)
    sizes, residual = mla_sizes(fields), fields.whole("attn_res_block_size")

    def layer(key: tuple[str, str]) -> Block:
        if key[0] == LINEAR:
            block = kimi_delta_attention(fields, b.hidden)
        else:
            block = mla(b.hidden, sizes)
            if fields.flag("mla_use_output_gate"):
                width = sizes.heads * sizes.v_dim
                block += linear("self_attn.g_proj", b.hidden, width, "column", Part.ATTENTION, sizes.heads)
        block += two_norms(b.hidden)
        if residual:
            block += attention_residual(b.hidden, "self_attention_res", "mlp_res")
        if key[1] == "dense":
            return block + gated_mlp(b.hidden, fields.size("intermediate_size"))
        return block + kimi_experts(fields, b.hidden)

    first = fields.size("first_k_dense_replace", default=1, least=0)
    sparse = ["moe" if s else "dense" for s in dense_or_expert(fields, b.layers, first)]
    keys = list(zip(kimi_mixer_types(fields, b.layers), sparse, strict=True))
    final = norm("model.norm", b.hidden)
    if residual:
        final += attention_residual(b.hidden, "model.output_attn_res")
    spec = decoder(
        fields,
        b,
        layer_kinds(keys, layer),
        final=final.tensors,
    )
    return with_mtp(spec, mtp_depth(fields))
