"""What most families read alike: widths, heads, sliding windows, dense-or-expert patterns."""

from __future__ import annotations

from meshwright.models.assemble import Base
from meshwright.models.blocks import Heads
from meshwright.models.fields import Fields, shown

SLIDING = "sliding_attention"
FULL = "full_attention"


def base(fields: Fields, *, tied: bool = False) -> Base:
    """hidden_size, num_hidden_layers, vocab_size, tie_word_embeddings (`tied` where the config is silent)."""
    return Base(
        fields.size("hidden_size", "n_embd", "d_model"),
        fields.layers("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        fields.size("vocab_size"),
        fields.flag("tie_word_embeddings", default=tied),
    )


def heads(fields: Fields, hidden: int, *, head_dim: int | None = None, kv_heads: int | None = None) -> Heads:
    """Head counts. Where the config is silent: `kv_heads` (else as many as heads) and `head_dim` (else hidden /
    heads), which are transformers' defaults of the family."""
    count = fields.size("num_attention_heads", "n_head")
    kv = fields.size("num_key_value_heads", default=kv_heads or count)
    dim = fields.whole("head_dim") or head_dim
    if dim is None:
        if hidden % count:
            raise fields.error(f"hidden_size {hidden} is not a multiple of num_attention_heads {count}")
        dim = hidden // count
    if count % kv:
        raise fields.error(f"num_attention_heads {count} is not a multiple of num_key_value_heads {kv}")
    return Heads(count, kv, dim)


def full_heads(fields: Fields, hidden: int, *keys: str) -> Heads:
    """As many KV heads as heads, the count under the first of `keys` that the config has (multi-head attention)."""
    count = fields.size(*keys)
    if hidden % count:
        key = next(k for k in keys if k in fields.values)
        raise fields.error(f"hidden size {hidden} is not a multiple of {key} {count}")
    return Heads(count, count, hidden // count)


def attention_types(fields: Fields, layers: int, *, every: int | None = None) -> list[str]:
    """Per layer 'sliding_attention' or 'full_attention' (or another mixer's name): `layer_types` where the config
    has it, else every `every`-th layer full and the others sliding, else all full."""
    named = fields.texts("layer_types")
    fields.per_layer("layer_types", named, layers)
    if named is not None:
        return named
    if every is None:
        return [FULL] * layers
    return [FULL if (i + 1) % every == 0 else SLIDING for i in range(layers)]


def window_of(fields: Fields, kind: str, *names: str) -> int | None:
    """The window of a layer of attention type `kind`."""
    if kind == FULL:
        return None
    if kind == SLIDING:
        return fields.size(*(names or ("sliding_window",)), most=10**9)
    raise fields.error(f"layer_types holds {shown(kind)}, which this family does not have; use {SLIDING} or {FULL}")


def dense_or_expert(fields: Fields, layers: int, leading_dense: int) -> list[bool]:
    """True for expert layers: `mlp_layer_types` where the config has it, a `moe_layer_freq` list, or all but the
    `leading_dense` first layers."""
    named = fields.texts("mlp_layer_types")
    if named is not None:
        fields.per_layer("mlp_layer_types", named, layers)
        return [kind == "sparse" for kind in named]
    if isinstance(fields.values.get("moe_layer_freq"), list):
        flags = fields.wholes("moe_layer_freq")
        fields.per_layer("moe_layer_freq", flags, layers)
        return [bool(flag) for flag in flags or []]
    return [i >= leading_dense for i in range(layers)]


def mtp_depth(fields: Fields, *names: str) -> int:
    """Number of multi-token-prediction modules that the checkpoint holds."""
    return fields.size(*(names or ("num_nextn_predict_layers",)), default=0, least=0, most=64)
