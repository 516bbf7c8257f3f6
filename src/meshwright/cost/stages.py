"""Stages: which decoder layers each pipeline stage of a candidate holds, reduced to the stages that can matter.

Under every schedule here an earlier stage holds at least as many live microbatches as a later one, so of several
stages with equal contents only the first can be the memory peak, and all have equal compute. A candidate is
therefore described by a few roles (S of them, padded with weight 0), each standing for `weight` real stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.candidates import BoolArray, Candidates, IntArray
from meshwright.models.spec import ModelSpec


@dataclass(frozen=True)
class Stages:
    """Arrays [n, S]; `layers` is [n, S, K] with K the model's layer kinds. Where vpp > 1 a stage sums its chunks.

    `index` is the (first) pp coordinate of the role; `weight` how many real stages it stands for, 0 for padding.
    """

    index: IntArray
    weight: IntArray
    layers: IntArray
    first: BoolArray
    last: BoolArray


def even_split(layers: int, chunks: int) -> tuple[int, ...]:
    """Layers of each chunk as even as can be, the longer ones in the middle: the first and last chunks also carry
    the embedding and the head, so they get the short end."""
    base, extra = divmod(layers, chunks)
    split = [base] * chunks
    start = (chunks - extra) // 2
    for i in range(start, start + extra):
        split[i] += 1
    return tuple(split)


def chunk_owner(chunk: int, pp: int, vpp: int, v_shaped: bool) -> int:
    """The stage that holds a chunk (chunks in model order): round robin, or V-shaped for ZBV and DualPipeV."""
    turn, position = divmod(chunk, pp)
    return pp - 1 - position if v_shaped and turn % 2 else position


def stages(model: ModelSpec, candidates: Candidates) -> Stages:
    """The stage roles of every candidate (see the module)."""
    raise NotImplementedError  # cost helper


__all__ = ["Stages", "chunk_owner", "even_split", "stages"]
_ = np
