"""The parts of a ring's ranks are all pairs of tokens that see each other, each once."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meshwright.runtime.attention_part import Pairs
from meshwright.runtime.context_parallel import ContextShard
from meshwright.runtime.process_groups import AxisGroup
from meshwright.runtime.ring_attention import RingPlan


class Place:
    """Of an axis only who one is and how many there are."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def ring_plan(rank: int, cp: int, seq: int, window: int | None = None) -> RingPlan:
    axis = cast(AxisGroup, Place(rank, cp))
    return RingPlan(axis, ContextShard(axis, seq).positions(), 1.0, window)


@given(cp=st.integers(1, 4), run=st.integers(1, 6), window=st.one_of(st.none(), st.integers(1, 60)))
def test_parts_are_the_pairs_that_see_each_other_once(cp: int, run: int, window: int | None) -> None:
    seq = 2 * cp * run
    distance = torch.arange(seq).unsqueeze(1) - torch.arange(seq)
    expected = (distance >= 0) & (distance < (window or seq))
    counted = torch.zeros(seq, seq, dtype=torch.int64)
    for rank in range(cp):
        plan = ring_plan(rank, cp, seq, window)
        for owner in range(cp):
            for rows, columns, pairs in plan.parts(owner):
                queries, keys = plan.positions[rank][rows], plan.positions[owner][columns]
                every = torch.ones(len(queries), len(keys), dtype=torch.bool)
                seen = every.tril() if pairs.causal else every if pairs.allowed is None else pairs.allowed
                counted[queries.unsqueeze(1), keys] += seen
    assert torch.equal(counted, expected.long())


@pytest.mark.parametrize("cp", [2, 4])
def test_without_a_window_a_step_is_one_call_without_a_mask(cp: int) -> None:
    for rank in range(cp):
        for owner in range(cp):
            ((_, _, pairs),) = ring_plan(rank, cp, 8 * cp).parts(owner)
            assert pairs == Pairs(causal=owner == rank)
