"""Survivors of a search: of the configurations that fit, those that some objective could choose.

Per mesh (tp, pp, cp, dp, ep, expert_tp) only the Pareto front of step time against memory is kept, so that millions of
rows shrink to thousands chunk by chunk. Equal configurations are ordered simplest first, the same way in every run.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from meshwright.cost.candidates import BoolArray, Candidates, FloatArray, IntArray

STEP_DIGITS = 1e-9
"""Steps that differ by less than this share are the same step: the difference is rounding of the sums."""


@dataclass(frozen=True)
class Survivors:
    """Configurations with their step time and peak memory, arrays [n]."""

    candidates: Candidates
    step_s: FloatArray
    memory_bytes: FloatArray

    def __len__(self) -> int:
        return len(self.step_s)

    def take(self, rows: IntArray | BoolArray) -> Survivors:
        return Survivors(self.candidates.take(rows), self.step_s[rows], self.memory_bytes[rows])


def simplicity(candidates: Candidates) -> IntArray:
    """Smaller is simpler: few cut axes, a plain schedule, no virtual stages, low ZeRO stage, little recompute. One
    number with digits for every knob, the weightiest first (62 bits)."""
    cut = sum((getattr(candidates, name) > 1).astype(np.int64) for name in ("tp", "pp", "cp", "ep", "expert_tp"))
    digits: list[tuple[IntArray, int]] = [
        (np.asarray(cut, dtype=np.int64), 8),
        (candidates.schedule, 8),
        (np.minimum(candidates.vpp, 127), 128),
        (candidates.zero, 4),
        (candidates.recompute, 4),
        (np.minimum(candidates.recompute_every, 15), 16),
        (candidates.sequence_parallel.astype(np.int64), 2),
        (np.minimum(candidates.tp, 4095), 4096),
        (np.minimum(candidates.micro_batch, 4095), 4096),
        (np.minimum(candidates.dp * candidates.cp - candidates.zero_shards, 65535), 65536),
    ]
    key = np.zeros(len(candidates), dtype=np.int64)
    for values, base in digits:
        key = key * base + values
    return key


def mesh_ids(candidates: Candidates) -> IntArray:
    """One number per mesh (62 bits; dp follows from the others, because a search has one GPU count)."""
    key = candidates.tp.copy()
    for values, bits in (
        (candidates.pp, 11),
        (candidates.cp, 13),
        (candidates.ep, 13),
        (candidates.expert_tp, 12),
    ):
        key = (key << bits) + values
    return key


def quantised(step_s: FloatArray) -> IntArray:
    """Step times as whole numbers, equal where they differ by rounding only."""
    return np.round(np.log(np.maximum(step_s, 1e-300)) / STEP_DIGITS).astype(np.int64)


def fronts(survivors: Survivors, groups: IntArray | None = None) -> Survivors:
    """The Pareto front of step time against memory within each group (all rows are one group where None), ordered by
    group, then fastest first. Of equal rows the simplest stays."""
    n = len(survivors)
    if n == 0:
        return survivors
    group = np.zeros(n, dtype=np.int64) if groups is None else groups
    simple = simplicity(survivors.candidates)
    order = np.lexsort((simple, survivors.memory_bytes, quantised(survivors.step_s), group))
    sorted_group = group[order]
    _, rank = np.unique(survivors.memory_bytes[order], return_inverse=True)
    position = np.cumsum(np.concatenate([[0], np.diff(sorted_group) != 0]))
    # falling offsets per group: the running minimum starts afresh in every group
    shifted = rank.ravel().astype(np.int64) - position * np.int64(n + 1)
    before = np.minimum.accumulate(shifted)
    better = np.ones(n, dtype=np.bool_)
    better[1:] = shifted[1:] < before[:-1]
    return survivors.take(order[better])


def joined(parts: list[Survivors]) -> Survivors:
    """Several sets as one."""
    names = [f.name for f in fields(Candidates) if f.name not in ("precision", "splits")]
    columns = {name: np.concatenate([getattr(p.candidates, name) for p in parts]) for name in names}
    return Survivors(
        Candidates(**columns, precision=parts[0].candidates.precision, splits=None),
        np.concatenate([p.step_s for p in parts]),
        np.concatenate([p.memory_bytes for p in parts]),
    )


__all__ = ["Survivors", "fronts", "joined", "mesh_ids", "simplicity"]
