"""DeepSeek-V4: compressed attention over one shared key-value head, hyper-connections, experts on every layer.

Each query sees a sliding window and one compressed key per `compress_ratios[i]` tokens: of heavily compressed layers
(ratio 128) all of them, of compressed sparse layers (ratio 4) the `index_topk` that an indexer picks.
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.models.assemble import decoder, layer_kinds, with_mtp
from meshwright.models.blocks import Block, linear, norm, vector
from meshwright.models.families.common import base, mtp_depth
from meshwright.models.families.llama import two_norms
from meshwright.models.families.moe import deepseek_moe_block, expert_sizes
from meshwright.models.fields import Fields, shown
from meshwright.models.spec import Attention, ModelSpec, Part, TensorSpec

SPARSE_RATIO = 4
"""Layers of this ratio have the indexer and overlapping windows of two (transformers' compressed sparse attention)."""
RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": SPARSE_RATIO, "heavily_compressed_attention": 128}


def compress_ratios(fields: Fields, layers: int) -> list[int]:
    """Compression ratio of every layer: `compress_ratios` (one more entry per prediction module) or `layer_types`."""
    ratios = fields.wholes("compress_ratios")
    if ratios is None:
        named = fields.texts("layer_types")
        if named is None:
            raise fields.error("compress_ratios is missing")
        unknown = sorted(set(named) - set(RATIOS))
        if unknown:
            raise fields.error(f"layer_types holds {shown(unknown[0])}; use {', '.join(RATIOS)}")
        ratios = [RATIOS[name] for name in named]
    if len(ratios) < layers:
        raise fields.error(f"compress_ratios has {len(ratios)} entries for {layers} layers")
    if set(ratios) - set(RATIOS.values()):
        raise fields.error(f"compress_ratios may hold only {sorted(RATIOS.values())}")
    return ratios[:layers]


def compressor(prefix: str, hidden: int, dim: int, ratio: int) -> Block:
    """Pools `ratio` tokens into one key: gated projections, twice as wide where windows overlap; replicated."""
    width, part = dim * (2 if ratio == SPARSE_RATIO else 1), Part.ATTENTION
    block = Block((TensorSpec(f"{prefix}position_bias", (ratio, width), part),))
    block += linear(f"{prefix}kv_proj", hidden, width, "none", part)
    block += linear(f"{prefix}gate_proj", hidden, width, "none", part)
    return block + norm(f"{prefix}kv_norm", dim, over_hidden=False)


def attention(fields: Fields, hidden: int, ratio: int) -> Block:
    """Low-rank queries split by heads, one replicated key-value head, output in groups of heads."""
    count, dim = fields.size("num_attention_heads"), fields.size("head_dim")
    rank, groups, out = fields.size("q_lora_rank"), fields.size("o_groups"), fields.size("o_lora_rank")
    if count % groups:
        raise fields.error(f"num_attention_heads {count} is not a multiple of o_groups {groups}")
    part, p = Part.ATTENTION, "self_attn."
    block = vector(f"{p}sinks", count, part, count)
    block += linear(f"{p}q_a_proj", hidden, rank, "none", part) + norm(f"{p}q_a_norm", rank, over_hidden=False)
    block += linear(f"{p}q_b_proj", rank, count * dim, "column", part, count)
    block += linear(f"{p}kv_proj", hidden, dim, "none", part) + norm(f"{p}kv_norm", dim, over_hidden=False)
    block += linear(f"{p}o_a_proj", count * dim // groups, groups * out, "column", part, groups)
    block += linear(f"{p}o_b_proj", groups * out, hidden, "row", part, groups)
    window = fields.size("sliding_window", most=10**9)
    mixer = Attention(count, 1, dim, dim, kv_cache_elements=dim, kv_replicated=True, window=window)
    if ratio:
        block += compressor(f"{p}compressor.", hidden, dim, ratio)
        mixer = replace(mixer, kv_compression=ratio)
    if ratio == SPARSE_RATIO:
        heads, width, ip = fields.size("index_n_heads"), fields.size("index_head_dim"), f"{p}compressor.indexer."
        block += compressor(ip, hidden, width, ratio)
        block += linear(f"{ip}q_b_proj", rank, heads * width, "none", part)
        block += linear(f"{ip}scorer.weights_proj", hidden, heads, "none", part)
        mixer = replace(
            mixer,
            top_k_keys=fields.size("index_topk"),
            indexer_heads=heads,
            indexer_dim=width,
            kv_cache_elements=dim + width,
        )
    return replace(block, mixer=mixer)


def hyper_connection(name: str, hidden: int, streams: int) -> Block:
    """Mixing weights of the residual streams around one block: pre, post and stream-to-stream (n^2 + 2 n rows)."""
    rows = streams * streams + 2 * streams
    block = linear(f"{name}.fn", streams * hidden, rows, "none", Part.NORM)
    fn = replace(block.tensors[0], name=f"{name}.fn")
    return (
        replace(block, tensors=(fn,)) + vector(f"{name}.base", rows, Part.NORM) + vector(f"{name}.scale", 3, Part.NORM)
    )


def deepseek_v4(fields: Fields) -> ModelSpec:
    b, experts = base(fields), expert_sizes(fields)
    streams = fields.size("hc_mult", default=4, most=64)

    def layer(name: str) -> Block:
        block = attention(fields, b.hidden, RATIOS[name]) + deepseek_moe_block(fields, b.hidden, experts)
        block += two_norms(b.hidden)
        return block + hyper_connection("attn_hc", b.hidden, streams) + hyper_connection("ffn_hc", b.hidden, streams)

    wide = streams * b.hidden
    final = (
        *norm("model.norm", b.hidden).tensors,
        TensorSpec("model.hc_head.hc_fn", (streams, wide), Part.NORM),
        TensorSpec("model.hc_head.hc_base", (streams,), Part.NORM),
        TensorSpec("model.hc_head.hc_scale", (1,), Part.NORM),
    )
    names = {ratio: name for name, ratio in RATIOS.items()}
    kinds = layer_kinds([names[r] for r in compress_ratios(fields, b.layers)], layer)
    spec = decoder(fields, b, kinds, final=final)
    return with_mtp(replace(spec, residual_streams=streams), mtp_depth(fields))
