"""How many elements of some tensors a rank holds, gathers under FSDP and owns of them: arrays over candidates.

Without a `RankPlace` everything is spread evenly, on the fullest tp rank. With one, rows are counted: FSDP2 cuts dim 0
of each parameter in chunks of ceil(rows / shards) and pads the last ones for its collectives; a vocabulary that tp does
not divide leaves the last tp ranks with fewer rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np

from meshwright.cost.candidates import BoolArray, Candidates, FloatArray, IntArray
from meshwright.cost.traffic_term import Scene
from meshwright.models.counting import local_pieces, per_rank_elements
from meshwright.models.spec import TensorSpec

Count = Callable[[Sequence[TensorSpec], Scene], FloatArray]
"""Elements of some tensors on a rank [n]: `held_dense`, `gathered` or `owned`."""


def state_shards(c: Candidates) -> IntArray:
    """Ranks that a gradient is spread over once data parallelism has reduced it [n]."""
    return np.where(c.zero >= 1, c.zero_shards, 1)


def held(tensors: Sequence[TensorSpec], x: Scene) -> tuple[FloatArray, FloatArray]:
    """Dense and expert elements before ZeRO [n]."""
    k = x.keys.candidates
    dense, expert = per_rank_elements(tensors, k.tp, k.ep, k.expert_tp)
    of_experts = expert[x.keys.inverse].astype(np.float64)
    if x.place is not None:
        return _by_row(tensors, x, lambda rows, shards: rows), of_experts
    return dense[x.keys.inverse].astype(np.float64), of_experts


def held_dense(tensors: Sequence[TensorSpec], x: Scene) -> FloatArray:
    """Dense elements before ZeRO [n]."""
    return held(tensors, x)[0]


def end_elements(x: Scene, count: Count, apart: BoolArray) -> FloatArray:
    """Elements of embedding, final norm and head on each stage [n, S], counted by `count`. `apart`: the first and the
    last chunk hold a copy each of what is tied, also where a V puts them on one stage."""
    stages, model = x.stages, x.model
    ends = stages.first * count(model.embedding_tensors, x)[:, None]
    ends = ends + stages.last * count(model.final_tensors + model.head_tensors, x)[:, None]
    return ends + (stages.last & apart) * count(model.tied_tensors, x)[:, None]


def gathered(tensors: Sequence[TensorSpec], x: Scene) -> FloatArray:
    """Dense elements of the buffer that FSDP gathers over the shards, padding included [n]."""
    if x.place is None:
        return held(tensors, x)[0]
    return _by_row(tensors, x, lambda rows, shards: -(-rows // shards) * shards)


def owned(tensors: Sequence[TensorSpec], x: Scene) -> FloatArray:
    """Dense elements of the rank's own shard [n]."""
    if x.place is None:
        return held(tensors, x)[0] / state_shards(x.candidates)
    shard = x.place.shard

    def own(rows: int, shards: int) -> int:
        if shards == 1:
            return rows
        chunk = -(-rows // shards)
        return min(rows, (shard + 1) * chunk) - min(rows, shard * chunk)

    return _by_row(tensors, x, own)


def sharded_length(shape: tuple[int, ...], shards: int) -> int:
    """Length of the dim that FSDP cuts: the first, or where that has fewer rows than there are shards (a shared
    expert's gate) the next that divides evenly, if any."""
    if shape[0] % shards == 0 or shape[0] >= shards:
        return shape[0]
    return next((length for length in shape if length % shards == 0), shape[0])


def _by_row(tensors: Sequence[TensorSpec], x: Scene, count: Callable[[int, int], int]) -> FloatArray:
    """Sum over the pieces on the scene's rank of count(rows, shards) x elements per row."""
    assert x.place is not None
    found: list[int] = []
    for tp, shards in zip(x.candidates.tp.tolist(), state_shards(x.candidates).tolist(), strict=True):
        total = 0
        for shape in (s for t in tensors if not t.experts for s in local_pieces(t, tp, x.place.tp)):
            rows = sharded_length(shape, shards)
            total += count(rows, shards) * (prod(shape) // rows) if rows else 0
        found.append(total)
    return np.array(found, dtype=np.float64)
