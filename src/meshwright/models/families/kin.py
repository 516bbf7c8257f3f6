"""Kin of Llama told apart by a few traits: which products have biases, which norms there are, which MLP.

Granite, SmolLM3, Seed-OSS, ERNIE 4.5, Ministral 3, Arcee, OLMo 2 and 3, EXAONE 4, StarCoder 2, StableLM, Cohere's
Command R, Phi-1 and 2; with experts OLMoE, GraniteMoE, Phi-3.5-MoE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from meshwright.models.assemble import decoder, head, layer_kinds
from meshwright.models.blocks import Block, Heads, gated_mlp, gqa, norm, plain_mlp, routed_experts, router
from meshwright.models.families.common import SLIDING, attention_types, base, heads, window_of
from meshwright.models.families.llama import head_norms
from meshwright.models.families.moe import expert_sizes
from meshwright.models.fields import Fields
from meshwright.models.spec import ModelSpec, Part, TensorSpec

BEFORE = ("input_layernorm", "post_attention_layernorm")
AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class Switch:
    """A yes or no that the config states under `key`, `default` where it is silent (no key: always `default`)."""

    key: str = ""
    default: bool = False

    def read(self, fields: Fields) -> bool:
        return fields.flag(self.key, default=self.default) if self.key else self.default


ALWAYS, NEVER = Switch(default=True), Switch()


@dataclass(frozen=True)
class Traits:
    """What sets a family apart. `kv_heads_stated`: the config must state its KV heads (transformers' default is a
    number of some model, not the number of heads). `sliding_every`: every n-th layer is full, the others slide."""

    norms: tuple[str, ...] = BEFORE
    norm_bias: bool = False
    q_norm: str = ""  # "head": one weight for all heads; "full": over all heads; "each": one per head, if use_qk_norm
    qkv_bias: Switch = NEVER
    output_bias: Switch = NEVER
    output: str = "o_proj"
    plain_mlp: tuple[str, str] | None = None
    mlp_bias: Switch = NEVER
    head_bias: Switch = NEVER
    experts: tuple[str, str] | None = None  # prefix of the experts, name of the router
    final_norm: str = "model.norm"
    tied: bool = False
    head_dim: int | None = None
    kv_heads_stated: bool = True
    sliding_every: int | None = None
    all_slide: bool = False


ATTENTION_BIAS = Switch("attention_bias")
TRAITS: dict[str, Traits] = {
    "granite": Traits(
        qkv_bias=ATTENTION_BIAS, output_bias=ATTENTION_BIAS, mlp_bias=Switch("mlp_bias"), kv_heads_stated=False
    ),
    "smollm3": Traits(qkv_bias=ATTENTION_BIAS, output_bias=ATTENTION_BIAS, mlp_bias=Switch("mlp_bias"), tied=True),
    "seed_oss": Traits(
        qkv_bias=Switch("attention_bias", default=True),
        output_bias=Switch("attention_out_bias"),
        mlp_bias=Switch("mlp_bias"),
        head_dim=128,
    ),
    "ernie4_5": Traits(
        qkv_bias=Switch("use_bias"),
        output_bias=Switch("use_bias"),
        mlp_bias=Switch("use_bias"),
        tied=True,
        head_dim=128,
    ),
    "ministral3": Traits(head_dim=128),
    "arcee": Traits(
        qkv_bias=ATTENTION_BIAS,
        output_bias=ATTENTION_BIAS,
        mlp_bias=Switch("mlp_bias"),
        plain_mlp=("mlp.up_proj", "mlp.down_proj"),
    ),
    "olmo2": Traits(
        norms=AFTER, q_norm="full", qkv_bias=ATTENTION_BIAS, output_bias=ATTENTION_BIAS, kv_heads_stated=False
    ),
    "olmo3": Traits(
        norms=AFTER,
        q_norm="full",
        qkv_bias=ATTENTION_BIAS,
        output_bias=ATTENTION_BIAS,
        kv_heads_stated=False,
        sliding_every=4,
    ),
    "exaone4": Traits(norms=AFTER, q_norm="head", sliding_every=4),
    "starcoder2": Traits(
        norm_bias=True,
        qkv_bias=Switch("use_bias", default=True),
        output_bias=Switch("use_bias", default=True),
        plain_mlp=("mlp.c_fc", "mlp.c_proj"),
        mlp_bias=Switch("use_bias", default=True),
        tied=True,
        all_slide=True,
    ),
    "stablelm": Traits(norm_bias=True, qkv_bias=Switch("use_qkv_bias")),
    "cohere": Traits(
        norms=("input_layernorm",),
        q_norm="each",
        qkv_bias=ATTENTION_BIAS,
        output_bias=ATTENTION_BIAS,
        tied=True,
        kv_heads_stated=False,
    ),
    "cohere2": Traits(
        norms=("input_layernorm",),
        qkv_bias=ATTENTION_BIAS,
        output_bias=ATTENTION_BIAS,
        tied=True,
        kv_heads_stated=False,
        sliding_every=4,
    ),
    "phi": Traits(
        norms=("input_layernorm",),
        norm_bias=True,
        qkv_bias=ALWAYS,
        output_bias=ALWAYS,
        output="dense",
        plain_mlp=("mlp.fc1", "mlp.fc2"),
        mlp_bias=ALWAYS,
        head_bias=ALWAYS,
        final_norm="model.final_layernorm",
        kv_heads_stated=False,
    ),
    "olmoe": Traits(
        q_norm="full",
        qkv_bias=ATTENTION_BIAS,
        output_bias=ATTENTION_BIAS,
        experts=("mlp.experts.", "mlp.gate"),
        kv_heads_stated=False,
    ),
    "granitemoe": Traits(
        qkv_bias=ATTENTION_BIAS,
        output_bias=ATTENTION_BIAS,
        experts=("block_sparse_moe.experts.", "block_sparse_moe.router"),
        kv_heads_stated=False,
    ),
    "phimoe": Traits(
        norm_bias=True,
        qkv_bias=ATTENTION_BIAS,
        output_bias=ATTENTION_BIAS,
        experts=("mlp.experts.", "mlp.router"),
        head_bias=Switch("lm_head_bias"),
        all_slide=True,
    ),
}


def kin(traits: Traits) -> Callable[[Fields], ModelSpec]:
    """The recipe of a family with these traits."""

    def recipe(fields: Fields) -> ModelSpec:
        b = base(fields, tied=traits.tied)
        if traits.kv_heads_stated:
            fields.size("num_key_value_heads")
        sizes = heads(fields, b.hidden, head_dim=traits.head_dim)

        def layer(kind: str) -> Block:
            block = gqa(
                b.hidden,
                sizes,
                output=traits.output,
                qkv_bias=traits.qkv_bias.read(fields),
                output_bias=traits.output_bias.read(fields),
                window=window_of(fields, kind),
            )
            for name in traits.norms:
                block += norm(name, b.hidden, traits.norm_bias)
            return block + _query_norms(fields, traits, sizes) + _mlp(fields, traits, b.hidden)

        return decoder(
            fields,
            b,
            layer_kinds(_attention_types(fields, traits, b.layers), layer),
            final=norm(traits.final_norm, b.hidden, traits.norm_bias).tensors,
            head_tensors=head(b.vocab, b.hidden, bias=traits.head_bias.read(fields)),
        )

    return recipe


def _attention_types(fields: Fields, traits: Traits, layers: int) -> list[str]:
    """Full everywhere unless the family slides and the config gives a window."""
    if fields.values.get("sliding_window") is None or not (traits.sliding_every or traits.all_slide):
        return attention_types(fields, layers)
    if traits.all_slide:
        return [SLIDING] * layers
    return attention_types(fields, layers, every=fields.size("sliding_window_pattern", default=traits.sliding_every))


def _query_norms(fields: Fields, traits: Traits, sizes: Heads) -> Block:
    if traits.q_norm == "head":
        return head_norms(sizes)
    if traits.q_norm == "full":
        q = norm("self_attn.q_norm", sizes.heads * sizes.head_dim, over_hidden=False, units=sizes.heads)
        k_width = sizes.kv_heads * sizes.head_dim
        return q + norm("self_attn.k_norm", k_width, over_hidden=False, units=sizes.kv_heads)
    if traits.q_norm == "each" and fields.flag("use_qk_norm"):
        named = (("q_norm", sizes.heads), ("k_norm", sizes.kv_heads))
        return Block(
            tuple(
                TensorSpec(f"self_attn.{name}.weight", (count, sizes.head_dim), Part.NORM, count, split_dim=0)
                for name, count in named
            )
        )
    if fields.flag("use_qk_norm") or fields.flag("qk_layernorm"):
        raise fields.error("norms over q and k heads apart (use_qk_norm, qk_layernorm) are not read for this family")
    return Block()


def _mlp(fields: Fields, traits: Traits, hidden: int) -> Block:
    if traits.experts is not None:
        prefix, gate = traits.experts
        experts = expert_sizes(fields, "intermediate_size")
        return router(gate, hidden, experts.experts) + routed_experts(hidden, experts, prefix=prefix)
    width, bias = fields.size("intermediate_size"), traits.mlp_bias.read(fields)
    if traits.plain_mlp is not None:
        return plain_mlp(hidden, width, traits.plain_mlp, bias=bias)
    return gated_mlp(hidden, width, bias=bias)


RECIPES: dict[str, Callable[[Fields], ModelSpec]] = {name: kin(traits) for name, traits in TRAITS.items()}
