"""Parameters of a stage and of a rank: how many elements of every tensor a rank holds.

A tensor's units (heads, columns, vocabulary rows) go to tp ranks in chunks of ceil(units / tp): the first ranks are
the fullest. Vocabulary rows that frameworks add to make the table divisible are zeros, not parameters: they are not
counted here, and the fullest rank holds ceil(vocab / tp) rows with or without them. Units fewer than ranks are
replicated over groups of ranks. Routed experts go to ep ranks in chunks of ceil(experts / ep), their columns to
expert_tp. Works on ints and on NumPy arrays of sizes alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig
from meshwright.models.spec import LayerKind, ModelSpec, Part, TensorSpec

IntArray = NDArray[np.int64]


class Place(Protocol):
    """Position of a rank on each axis (layout's coordinates have these fields)."""

    @property
    def dp(self) -> int: ...
    @property
    def pp(self) -> int: ...
    @property
    def cp(self) -> int: ...
    @property
    def tp(self) -> int: ...


def per_rank_elements(
    tensors: Iterable[TensorSpec], tp: ArrayLike, ep: ArrayLike = 1, expert_tp: ArrayLike = 1
) -> tuple[IntArray, IntArray]:
    """Elements on the fullest rank: of dense tensors, of routed-expert tensors. Sizes broadcast."""
    tp_size, ep_size, etp_size = np.broadcast_arrays(
        np.asarray(tp, np.int64), np.asarray(ep, np.int64), np.asarray(expert_tp, np.int64)
    )
    dense, expert = np.zeros_like(tp_size), np.zeros_like(tp_size)
    for tensor in tensors:
        if tensor.experts:
            local = -(-tensor.experts // ep_size) * (tensor.size // tensor.experts)
            expert += _fullest(tensor, local, etp_size)
        else:
            dense += _fullest(tensor, np.full_like(tp_size, tensor.size), tp_size)
    return dense, expert


def _segments(tensor: TensorSpec) -> tuple[tuple[int, int], ...]:
    """(rows, units) of the parts of the split dimension."""
    if tensor.split_units is None or tensor.split_dim is None:
        return ()
    return tensor.fused or ((tensor.shape[tensor.split_dim], tensor.split_units),)


def _fullest(tensor: TensorSpec, elements: IntArray, ways: IntArray) -> IntArray:
    segments = _segments(tensor)
    if not segments or tensor.split_dim is None:
        return elements
    row = elements // tensor.shape[tensor.split_dim]
    share = np.zeros_like(elements)
    for rows, units in segments:
        share += -(-units // ways) * (rows // units) * row
    return share


def layer_parameters(
    kind: LayerKind, tp: ArrayLike, ep: ArrayLike = 1, expert_tp: ArrayLike = 1
) -> tuple[IntArray, IntArray]:
    """Elements of one layer on its fullest rank: (dense tensors, routed-expert tensors)."""
    return per_rank_elements(kind.tensors, tp, ep, expert_tp)


def stage_tensors(model: ModelSpec, start: int, stop: int, *, first: bool, last: bool) -> list[TensorSpec]:
    """Tensors of layers start..stop-1, the embedding if `first`, the final norm and the head if `last`. A tied
    embedding table is held by both end stages (once where one stage is both)."""
    if not 0 <= start <= stop <= model.num_layers:
        raise InputError(f"layers {start}..{stop} are not within the {model.num_layers} layers of {model.name}")
    tensors = [t for k in model.pattern[start:stop] for t in model.kinds[k].tensors]
    if first:
        tensors += model.embedding_tensors
    if last:
        tensors += model.final_tensors + (model.head_tensors if first else model.output_tensors)
    return tensors


def stage_parameters(model: ModelSpec, start: int, stop: int, first: bool, last: bool) -> int:
    """Parameters of a pipeline stage before any tensor or expert split."""
    return sum(t.size for t in stage_tensors(model, start, stop, first=first, last=last))


def _share(tensor: TensorSpec, ways: int, rank: int, *, owned: bool) -> int:
    """Elements (of one expert where the tensor is of experts) that `rank` of `ways` holds; with `owned`, those it is
    the first rank to hold."""
    size = tensor.size // (tensor.experts or 1)
    segments = _segments(tensor)
    if not segments or tensor.split_dim is None:
        return 0 if owned and rank else size
    row, held = size // tensor.shape[tensor.split_dim], 0
    for rows, units in segments:
        chunk = -(-units // ways)
        if units >= ways:
            count = max(0, min(units, (rank + 1) * chunk) - rank * chunk)
        else:
            first = rank == 0 or rank * units // ways != (rank - 1) * units // ways
            count = 1 if first or not owned else 0
        held += count * (rows // units) * row
    return held


def local_pieces(tensor: TensorSpec, ways: int, rank: int) -> list[tuple[int, ...]]:
    """Shapes of the parts of a dense tensor on `rank` of `ways`: one per fused part, because fused parts are split, and
    sharded over dp, each by itself."""
    segments = _segments(tensor)
    if not segments or tensor.split_dim is None:
        return [tensor.shape]
    pieces: list[tuple[int, ...]] = []
    for width, units in segments:
        chunk = -(-units // ways)
        count = max(0, min(units, (rank + 1) * chunk) - rank * chunk) if units >= ways else 1
        held = count * (width // units)
        pieces.append((*tensor.shape[: tensor.split_dim], held, *tensor.shape[tensor.split_dim + 1 :]))
    return pieces


def parts_with_units(tensor: TensorSpec, units: int) -> list[TensorSpec]:
    """The tensor where it splits into so many units, or those of its fused parts that do, as tensors of their own."""
    if not tensor.fused or tensor.split_dim is None:
        return [tensor] if tensor.split_units == units else []
    dim = tensor.split_dim
    return [
        replace(tensor, shape=(*tensor.shape[:dim], width, *tensor.shape[dim + 1 :]), split_units=units, fused=())
        for width, of_part in tensor.fused
        if of_part == units
    ]


def rank_parameters(
    model: ModelSpec,
    config: HybridParallelConfig,
    place: Place,
    held: Sequence[tuple[int, int]],
    *,
    last: bool,
    owned: bool = False,
) -> int:
    """Parameters on one rank before ZeRO. `held` are the (start, stop) layers of each chunk of its stage; `last` says
    that the stage holds the last chunk. With `owned`, replicas count on the first rank that holds them only, so that
    the sum over the world is the model's `parameters`."""
    first = place.pp == 0
    index = (place.dp * config.cp + place.cp) * config.tp + place.tp
    etp_rank, index = index % config.expert_tp, index // config.expert_tp
    ep_rank, expert_replica = index % config.ep, index // config.ep
    tensors = [t for a, b in held for t in stage_tensors(model, a, b, first=False, last=False)]
    tensors += model.embedding_tensors if first else ()
    if last:
        tied_copy = () if first or owned else model.tied_tensors
        tensors += model.final_tensors + model.head_tensors + tied_copy
    total = 0
    for tensor in tensors:
        if tensor.experts:
            chunk = -(-tensor.experts // config.ep)
            experts = max(0, min(tensor.experts, (ep_rank + 1) * chunk) - ep_rank * chunk)
            if not (owned and expert_replica):
                total += experts * _share(tensor, config.expert_tp, etp_rank, owned=owned)
        elif not (owned and (place.dp or place.cp)):
            total += _share(tensor, config.tp, place.tp, owned=owned)
    return total


def counted_kinds(model: ModelSpec) -> tuple[tuple[int, LayerKind], ...]:
    """(layers, kind) of the model, multi-token-prediction modules among them."""
    counts = model.layer_counts(0, model.num_layers)
    layers = tuple(zip(counts, model.kinds, strict=True))
    return (*layers, (model.mtp_layers, model.mtp_kind)) if model.mtp_kind else layers


def matmul_parameters(model: ModelSpec, *, head: bool = True) -> float:
    """N of the FLOP conventions: weights that multiply each token (routed experts: top-k of them), with the LM head,
    without the input embedding, norms and biases; multi-token-prediction modules and their head passes counted."""
    layers = sum(n * sum(m.k * m.n * m.tokens_factor for m in kind.matmuls) for n, kind in counted_kinds(model))
    return layers + (model.hidden * model.vocab * (1 + model.mtp_layers) if head else 0)


def active_parameters(model: ModelSpec) -> int:
    """Parameters that one token uses: all of them except the routed experts it is not sent to."""
    counts = model.layer_counts(0, model.num_layers)
    total = sum(t.size for t in model.outer_tensors)
    for n, kind in zip(counts, model.kinds, strict=True):
        for tensor in kind.tensors:
            used = tensor.size
            if tensor.part is Part.EXPERT:
                used = used * kind.top_k // tensor.experts
            total += n * used
    return total
