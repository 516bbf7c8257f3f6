"""From a family's recipe to a ModelSpec: shared outer tensors, distinct layer kinds and the pattern of layers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

from meshwright.models.blocks import Block, linear, norm, prefixed
from meshwright.models.fields import Fields
from meshwright.models.spec import LayerKind, ModelSpec, Part, TensorSpec

ACTIVATION_KEYS = ("hidden_activation", "hidden_act", "activation_function", "mlp_hidden_act", "activation")

Key = TypeVar("Key", bound=Hashable)

Kinds = tuple[tuple[LayerKind, ...], tuple[int, ...]]
"""Distinct kinds of layer, and the index of each layer's kind."""


@dataclass(frozen=True)
class Base:
    """The sizes that every config states."""

    hidden: int
    layers: int
    vocab: int
    tied: bool


def layer_kinds(keys: Sequence[Key], make: Callable[[Key], Block]) -> Kinds:
    """Distinct kinds in order of appearance and the pattern: `keys[i]` is what decides the shape of layer i."""
    order: dict[Key, int] = {}
    for key in keys:
        order.setdefault(key, len(order))
    return tuple(make(key).kind(_kind_name(key)) for key in order), tuple(order[key] for key in keys)


def alike(base: Base, layer: Block) -> Kinds:
    """Every layer of the same kind."""
    return layer_kinds(["dense"] * base.layers, lambda _: layer)


def _kind_name(key: object) -> str:
    return "+".join(str(part) for part in cast("tuple[object, ...]", key)) if isinstance(key, tuple) else str(key)


def embedding(name: str, rows: int, width: int, *, split: bool = True) -> TensorSpec:
    """A table of `rows` vectors, split by rows over tp (vocabulary) or replicated (positions)."""
    units, dim = (rows, 0) if split else (None, None)
    return TensorSpec(name, (rows, width), Part.EMBEDDING, units, split_dim=dim)


def head(vocab: int, hidden: int, *, bias: bool = False) -> tuple[TensorSpec, ...]:
    """An untied LM head."""
    tensors = [TensorSpec("lm_head.weight", (vocab, hidden), Part.HEAD, vocab, split_dim=0)]
    if bias:
        tensors.append(TensorSpec("lm_head.bias", (vocab,), Part.HEAD, vocab, split_dim=0))
    return tuple(tensors)


def decoder(
    fields: Fields,
    base: Base,
    kinds: Kinds,
    *,
    embeddings: tuple[TensorSpec, ...] | None = None,
    final: tuple[TensorSpec, ...] | None = None,
    head_tensors: tuple[TensorSpec, ...] | None = None,
    activation: str = "silu",
    dropout: float = 0.0,
) -> ModelSpec:
    """A ModelSpec with Llama's outer tensors unless others are given; `activation` is for configs that name none."""
    if not 0.0 <= dropout < 1.0:
        raise fields.error(f"dropout must be from 0 to below 1, got {dropout}")
    hidden, vocab = base.hidden, base.vocab
    return ModelSpec(
        name=fields.label,
        model_type=fields.text("model_type"),
        hidden=hidden,
        vocab=vocab,
        kinds=kinds[0],
        pattern=kinds[1],
        embedding_tensors=embeddings or (embedding("model.embed_tokens.weight", vocab, hidden),),
        final_tensors=norm("model.norm", hidden).tensors if final is None else final,
        head_tensors=() if base.tied else (head_tensors or head(vocab, hidden)),
        tied_embeddings=base.tied,
        activation=fields.text(*ACTIVATION_KEYS, default=activation),
        dropout=dropout,
        max_positions=fields.positions(),
    )


def with_mtp(spec: ModelSpec, depth: int, layer: LayerKind | None = None) -> ModelSpec:
    """Add `depth` multi-token-prediction modules (DeepSeek-V3, arXiv 2412.19437, eq. 21-23): each a projection of two
    normed hidden states to one, a decoder layer of the given (last) kind and a norm; embedding and head are shared."""
    if depth == 0:
        return spec
    h, kind = spec.hidden, layer or spec.kinds[spec.pattern[-1]]
    joined = linear("eh_proj", 2 * h, h, "none", Part.MTP)
    extras = (
        TensorSpec("enorm.weight", (h,), Part.MTP),
        TensorSpec("hnorm.weight", (h,), Part.MTP),
        *joined.tensors,
        *kind.tensors,
        TensorSpec("norm.weight", (h,), Part.MTP),
    )
    module = replace(kind, name="mtp", tensors=extras, matmuls=joined.matmuls + kind.matmuls, norms=kind.norms + 3)
    tensors = tuple(t for i in range(depth) for t in prefixed(f"mtp.{i}.", extras))
    return replace(spec, mtp_tensors=tensors, mtp_layers=depth, mtp_kind=module)
