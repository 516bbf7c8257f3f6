"""Models given by their shape alone: a row of published measurements, or nothing but a parameter count.

`from_shape` reads the `model` object of a measurement row. `typical_shape` makes a Llama-like model of a given size.
Both build through the same blocks as configs do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from meshwright.errors import InputError, is_number
from meshwright.models.assemble import Base, decoder, embedding, layer_kinds, with_mtp
from meshwright.models.blocks import (
    Block,
    ExpertSizes,
    Heads,
    MlaSizes,
    gated_mlp,
    gqa,
    mla,
    norm,
    plain_mlp,
    routed_experts,
    router,
    with_shared_expert,
)
from meshwright.models.families.llama import llama
from meshwright.models.fields import Fields, shown
from meshwright.models.spec import ModelSpec, Part

LEARNED_POSITIONS = 1024
"""Rows of the position table of GPT-like shapes (no gate, as many KV heads as heads): GPT-2's length. Rows do not state
it; with this one every published row's total is met within 1 %."""


def from_shape(shape: Mapping[str, object]) -> ModelSpec:
    """A model from the keys of a measurement row's `model` object (null: not applicable).

    A shape without gated MLP, with as many KV heads as heads and a tied head is GPT-like: biases, LayerNorm with bias,
    learned positions (that is what the rows' parameter counts hold). All others are Llama-like.
    """
    fields = Fields({k: v for k, v in shape.items() if v is not None}, f"model shape {shown(shape.get('name', '?'))}")
    hidden, vocab = fields.size("hidden"), fields.size("vocab")
    layers, tied = fields.layers("layers"), fields.flag("tied_embeddings")
    gated = fields.flag("gated_mlp", default=True)
    sizes = _shape_heads(fields, hidden)
    biased = not gated and tied and sizes.kv_heads == sizes.heads and fields.text("attention") != "mla"
    first_moe = fields.size("dense_layers", default=0, least=0) if fields.whole("experts") else layers
    every = fields.size("sliding_window_every", default=1)
    window = fields.whole("sliding_window", most=10**9)

    def layer(key: tuple[str, str]) -> Block:
        block = _shape_attention(fields, hidden, sizes, biased, window if key[0] == "sliding" else None)
        block += norm("input_layernorm", hidden, biased) + norm("post_attention_layernorm", hidden, biased)
        return block + (
            _shape_experts(fields, hidden, gated) if key[1] == "moe" else _shape_mlp(fields, hidden, biased)
        )

    keys = [
        ("sliding" if window and i % every == 0 else "full", "moe" if i >= first_moe else "dense")
        for i in range(layers)
    ]
    tables = [embedding("model.embed_tokens.weight", vocab, hidden)]
    if biased:
        tables.append(embedding("model.embed_positions.weight", LEARNED_POSITIONS, hidden, split=False))
    spec = decoder(
        fields,
        Base(hidden, layers, vocab, tied),
        layer_kinds(keys, layer),
        embeddings=tuple(tables),
        final=norm("model.norm", hidden, biased).tensors,
        activation="silu" if gated else "gelu",
    )
    spec = with_mtp(spec, fields.size("mtp_layers", default=0, least=0, most=64))
    return replace(spec, name=fields.text("name", default="shape"), model_type="shape", source="shape")


def _shape_heads(fields: Fields, hidden: int) -> Heads:
    count = fields.size("heads")
    kv = fields.size("kv_heads", default=count)
    if count % kv:
        raise fields.error(f"heads {count} is not a multiple of kv_heads {kv}")
    dim = fields.whole("head_dim")
    if dim is None:
        if hidden % count:
            raise fields.error(f"hidden {hidden} is not a multiple of heads {count}")
        dim = hidden // count
    return Heads(count, kv, dim)


def _shape_attention(fields: Fields, hidden: int, sizes: Heads, biased: bool, window: int | None) -> Block:
    kind = fields.text("attention", default="gqa")
    if kind == "mla":
        return mla(
            hidden,
            MlaSizes(
                sizes.heads,
                fields.whole("q_lora_rank"),
                fields.size("kv_lora_rank"),
                fields.size("qk_nope_dim"),
                fields.size("qk_rope_dim"),
                fields.size("v_head_dim"),
            ),
        )
    if kind not in ("mha", "gqa", "mqa"):
        raise fields.error(f"attention must be mha, gqa, mqa or mla, got {shown(kind)}")
    return gqa(hidden, sizes, qkv_bias=biased, output_bias=biased, window=window)


def _shape_mlp(fields: Fields, hidden: int, biased: bool) -> Block:
    width = fields.size("ffn")
    if fields.flag("gated_mlp", default=True):
        return gated_mlp(hidden, width)
    return plain_mlp(hidden, width, ("mlp.up_proj", "mlp.down_proj"), bias=biased)


def _shape_experts(fields: Fields, hidden: int, gated: bool) -> Block:
    experts, top_k = fields.size("experts"), fields.size("topk")
    if top_k > experts:
        raise fields.error(f"topk {top_k} is more than the {experts} experts")
    sizes = ExpertSizes(experts, top_k, fields.size("moe_ffn", "ffn"), gated)
    block = router("mlp.gate", hidden, experts) + routed_experts(hidden, sizes)
    shared = fields.size("shared_expert_ffn", default=0, least=0)
    if not shared:
        return block
    mlp = gated_mlp(hidden, shared, prefix="mlp.shared_experts.", part=Part.SHARED_EXPERT)
    return with_shared_expert(block, mlp, shared)


# What follows makes a shape out of a parameter count.

LEAST_B, MOST_B = 0.1, 2000.0
KV_HEADS = 8
MLP_RATIO = 3.5
"""MLP width over hidden size: 14336 / 4096 and 28672 / 8192 in Llama 3 8B and 70B (arXiv 2407.21783, table 3)."""
ASPECT = 115.0
"""Hidden size over layers: 128, 102 and 130 in Llama 3 8B, 70B and 405B (same table)."""
TIED_BELOW_B = 4.0
"""Llama 3.2 1B and 3B tie the head to the embedding, 8B and above do not."""
WIDE_HIDDEN = 3072
"""From here heads are of 128 (Llama 3.2 3B), below of 64 (1B)."""


def typical_shape(params_b: float, layers: int | None = None, hidden: int | None = None) -> ModelSpec:
    """A Llama-3-like model of `params_b` billion parameters (0.1 to 2000), of `layers` and `hidden` where given.

    Hidden size about 115 times the layers, heads of 128 (64 below 3072) in eights, 8 KV heads, layers that pipelines
    can share out, gated MLP about 3.5 times as wide as hidden, vocabulary 128,256 (32,000 below 1B), tied below 4B.
    The MLP width makes up the rest: the total is within 5 % of the request, or the request is refused.
    """
    if not is_number(params_b) or not math.isfinite(params_b) or not LEAST_B <= params_b <= MOST_B:
        raise InputError(f"model size must be from {LEAST_B:g} to {MOST_B:g} billion parameters, got {shown(params_b)}")
    _check_given("layers", layers, 1, 1000)
    _check_given("hidden", hidden, 64, 200_000)
    best: ModelSpec | None = None
    best_score = math.inf
    for width, depth in _candidates(params_b, layers, hidden):
        spec = _llama_like(params_b, width, depth)
        if spec is not None and abs(spec.parameters / (params_b * 1e9) - 1) <= 0.05:
            score = abs(math.log(width / depth / ASPECT)) + abs(math.log(_mlp_width(spec) / width / MLP_RATIO))
            if score < best_score:
                best, best_score = spec, score
    if best is None:
        given = " and ".join(f"{n}={v}" for n, v in (("layers", layers), ("hidden", hidden)) if v is not None)
        raise InputError(f"no Llama-like model of {params_b:g} B parameters has {given}; leave it out or change it")
    return replace(best, name=f"typical-{params_b:g}b", source="typical shape (Llama 3 like)")


def _check_given(name: str, value: int | None, least: int, most: int) -> None:
    if value is not None and not (is_number(value) and least <= value <= most):
        raise InputError(f"{name} must be from {least} to {most}, got {shown(value)}")


def _tables(params_b: float) -> tuple[int, bool]:
    """Vocabulary and whether the head is tied."""
    return (128_256 if params_b >= 1 else 32_000), params_b < TIED_BELOW_B


def _head_dim(hidden: int) -> int:
    return 128 if hidden >= WIDE_HIDDEN else 64


def _candidates(params_b: float, layers: int | None, hidden: int | None) -> list[tuple[int, int]]:
    """(hidden, layers) pairs worth trying: what is given, else widths of whole eights of heads, depths of whole fours
    (eights from 64 layers on)."""
    vocab, tied = _tables(params_b)
    widths = [hidden] if hidden else [*range(512, WIDE_HIDDEN, 512), *range(WIDE_HIDDEN, 40_961, 1024)]
    pairs: list[tuple[int, int]] = []
    for width in widths:
        per_layer = width * width * (2 + 3 * MLP_RATIO) + 2 * width * KV_HEADS * _head_dim(width)
        depth = (params_b * 1e9 - vocab * width * (1 if tied else 2)) / per_layer
        if layers:
            pairs.append((width, layers))
        elif 1 <= depth <= width:
            step = 8 if depth >= 64 else 4 if depth >= 10 else 1
            low = max(1, int(depth) // step * step)
            pairs += [(width, low), (width, low + step)]
    return pairs


def _mlp_width(spec: ModelSpec) -> int:
    mlp = spec.kinds[0].mlp
    return mlp.width if mlp is not None else 0


def _llama_like(params_b: float, hidden: int, layers: int) -> ModelSpec | None:
    """The Llama of that width and depth whose MLP width brings it nearest; None where no sensible one does."""
    dim = _head_dim(hidden)
    count = hidden // dim
    if count < 1:
        return None
    kv = math.gcd(count, KV_HEADS)
    vocab, tied = _tables(params_b)
    others = vocab * hidden * (1 if tied else 2) + layers * (2 * hidden * (count + kv) * dim + 2 * hidden)
    width = round((params_b * 1e9 - others) / (layers * 3 * hidden) / 128) * 128
    if not hidden <= width <= 12 * hidden:
        return None
    config: dict[str, object] = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": count,
        "num_key_value_heads": kv,
        "head_dim": dim,
        "intermediate_size": width,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }
    return llama(Fields(config, "typical shape"))
