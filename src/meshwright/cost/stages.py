"""Stages: which decoder layers each pipeline stage of a candidate holds, reduced to the stages that can matter.

An earlier stage holds at least as many live microbatches as a later one, so of several stages with equal contents
only the first can be the memory peak, and all have equal compute. A candidate is therefore described by a few roles
(S of them, padded with weight 0), each standing for `weight` real stages.

Where a schedule folds the pipeline into a V, the first stage also holds the last chunk: embedding and head live on it.
There a later stage holds at least as many live microbatches (more of them below 2p), so the last of equals counts.

Roles depend only on (pp, vpp, V-shaped or not, layer split): `stage_keys` finds the distinct ones, `role_table` works
each out once, and `stages` gathers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from meshwright.cost.candidates import SCHEDULES, BoolArray, Candidates, IntArray, distinct
from meshwright.layout.config import HybridParallelConfig
from meshwright.layout.split import even_split
from meshwright.models.spec import ModelSpec
from meshwright.schedules.placement import V_SHAPED, chunk_owner


@dataclass(frozen=True)
class Stages:
    """Arrays [n, S]; `layers` is [n, S, K] with K the model's layer kinds. Where vpp > 1 a stage sums its chunks.

    `index` is the pp coordinate of the role (first of equals, in a V the last); `weight` how many real stages it stands
    for, 0 for padding. Padding repeats the role before it, so that maxima over roles need no mask. Roles are in order
    of `index`. `sends` is the number of the stage's chunks whose output goes to another stage (`receives`: whose input
    comes from one).
    """

    index: IntArray
    weight: IntArray
    layers: IntArray
    first: BoolArray
    last: BoolArray
    sends: IntArray
    receives: IntArray

    def take(self, rows: IntArray) -> Stages:
        """The roles of the chosen rows, stage after stage in memory: there are few stages and many rows, and arithmetic
        over long columns is several times as fast as over rows of four."""
        return Stages(**{f.name: getattr(self, f.name).T.take(rows, axis=-1).T for f in fields(self)})


@dataclass(frozen=True)
class StageKeys:
    """Distinct pipeline shapes among candidates: arrays over keys, and `inverse` [n] from candidate to key."""

    pp: IntArray
    vpp: IntArray
    v_shaped: BoolArray
    splits: tuple[tuple[int, ...] | None, ...]
    inverse: IntArray


def is_v_shaped(candidates: Candidates) -> BoolArray:
    """Rows whose schedule folds the pipeline back on itself."""
    return np.array([s in V_SHAPED for s in SCHEDULES])[candidates.schedule]


def stage_keys(candidates: Candidates) -> StageKeys:
    """Distinct (pp, vpp, V-shaped, layer split) among the candidates."""
    split_of: dict[tuple[int, ...] | None, int] = {None: 0}
    splits = np.zeros(len(candidates), dtype=np.int64)
    if candidates.splits is not None:
        splits = np.array([split_of.setdefault(s, len(split_of)) for s in candidates.splits], dtype=np.int64)
    v_shaped = is_v_shaped(candidates)
    first, inverse = distinct([candidates.pp, candidates.vpp, v_shaped, splits])
    known = list(split_of)
    chosen: list[int] = splits[first].tolist()
    return StageKeys(
        pp=candidates.pp[first],
        vpp=candidates.vpp[first],
        v_shaped=v_shaped[first],
        splits=tuple(known[i] for i in chosen),
        inverse=inverse,
    )


def chunk_layers(pattern: tuple[int, ...], kinds: int, pp: int, vpp: int, split: tuple[int, ...] | None) -> IntArray:
    """Layers of each kind in each chunk, in model order [chunks, K]."""
    sizes = split or even_split(len(pattern), pp * vpp)
    if len(sizes) != pp * vpp or sum(sizes) != len(pattern):
        raise ValueError(f"layer split {sizes} does not place {len(pattern)} layers in {pp * vpp} chunks")
    one_hot = np.eye(kinds, dtype=np.int64)[np.array(pattern, dtype=np.int64)]
    before = np.vstack([np.zeros((1, kinds), dtype=np.int64), np.cumsum(one_hot, axis=0)])
    return np.diff(before[np.concatenate([[0], np.cumsum(sizes)])], axis=0)


def stage_layers(
    model: ModelSpec, pp: int, vpp: int, v_shaped: bool, split: tuple[int, ...] | None = None
) -> tuple[IntArray, IntArray]:
    """Layers of each kind on every stage [pp, K], and the stage of every chunk [pp * vpp]."""
    return _layers_and_owners(model.pattern, len(model.kinds), pp, vpp, v_shaped, split)


def _layers_and_owners(
    pattern: tuple[int, ...], kinds: int, pp: int, vpp: int, v_shaped: bool, split: tuple[int, ...] | None
) -> tuple[IntArray, IntArray]:
    owner = np.array([chunk_owner(c, pp, vpp, v_shaped) for c in range(pp * vpp)], dtype=np.int64)
    layers = np.zeros((pp, kinds), dtype=np.int64)
    np.add.at(layers, owner, chunk_layers(pattern, kinds, pp, vpp, split))
    return layers, owner


def _boundaries(owner: IntArray, pp: int) -> tuple[IntArray, IntArray]:
    """Chunks of each stage that send their output to, and receive their input from, another stage."""
    crosses = owner[:-1] != owner[1:]
    sends = np.bincount(owner[:-1][crosses], minlength=pp)
    receives = np.bincount(owner[1:][crosses], minlength=pp)
    return sends, receives


def _contents(
    pattern: tuple[int, ...], kinds: int, pp: int, vpp: int, v_shaped: bool, split: tuple[int, ...] | None
) -> IntArray:
    """Every stage as a row (first, last, sends, receives, layers of each kind)."""
    layers, owner = _layers_and_owners(pattern, kinds, pp, vpp, v_shaped, split)
    position = np.arange(pp)
    sends, receives = _boundaries(owner, pp)
    return np.column_stack([position == 0, position == owner[-1], sends, receives, layers]).astype(np.int64)


@lru_cache(maxsize=8192)
def _roles(
    pattern: tuple[int, ...], kinds: int, pp: int, vpp: int, v_shaped: bool, split: tuple[int, ...] | None
) -> IntArray:
    """Distinct stages as rows (index, weight, first, last, sends, receives, layers of each kind), by index. Cached: a
    search asks for the same few shapes in every chunk."""
    contents = _contents(pattern, kinds, pp, vpp, v_shaped, split)
    index: dict[tuple[int, ...], int] = {}
    weight: dict[tuple[int, ...], int] = {}
    listed: list[list[int]] = contents.tolist()
    for at, content in enumerate(tuple(stage) for stage in listed):
        index[content] = at if v_shaped else index.get(content, at)
        weight[content] = weight.get(content, 0) + 1
    return np.array(sorted((at, weight[content], *content) for content, at in index.items()), dtype=np.int64)


def role_table(model: ModelSpec, keys: StageKeys) -> Stages:
    """The roles of every distinct pipeline shape, padded to the longest."""
    shapes = zip(keys.pp.tolist(), keys.vpp.tolist(), keys.v_shaped.tolist(), keys.splits, strict=True)
    roles = [_roles(model.pattern, len(model.kinds), pp, vpp, v, split) for pp, vpp, v, split in shapes]
    width = max(len(r) for r in roles)
    table = np.stack([np.vstack([r, np.repeat(r[-1:], width - len(r), axis=0)]) for r in roles])
    padding = np.arange(width)[None, :] >= np.array([len(r) for r in roles])[:, None]
    index, weight, first, last, sends, receives = (table[:, :, i] for i in range(6))
    return Stages(index, np.where(padding, 0, weight), table[:, :, 6:], first > 0, last > 0, sends, receives)


def stages(model: ModelSpec, candidates: Candidates) -> Stages:
    """The stage roles of every candidate (see the module)."""
    keys = stage_keys(candidates)
    return role_table(model, keys).take(keys.inverse)


def every_stage(model: ModelSpec, config: HybridParallelConfig) -> Stages:
    """All stages of one configuration as roles of their own [1, pp], equal ones too."""
    v_shaped = config.schedule in V_SHAPED
    rows = _contents(model.pattern, len(model.kinds), config.pp, config.vpp, v_shaped, config.layer_split)[None]
    first, last, sends, receives = (rows[:, :, i] for i in range(4))
    index = np.arange(config.pp, dtype=np.int64)[None]
    return Stages(index, np.ones_like(index), rows[:, :, 4:], first > 0, last > 0, sends, receives)
