"""The numbers of an exchange: laws of assignments, balanced counts and the order of experts."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from meshwright.runtime.expert_parallel.routing import (
    assign,
    assign_within_capacity,
    balanced_counts,
    balanced_experts,
    capacity_of,
    order_by_expert,
)

CPU = torch.device("cpu")
choices = st.integers(1, 6).flatmap(
    lambda e: st.tuples(st.just(e), st.lists(st.integers(0, e - 1), min_size=1, max_size=30))
)


@given(st.integers(1, 50), st.integers(1, 12), st.integers(1, 8))
def test_balanced_counts_are_those_of_the_balanced_assignment_and_even_over_the_group(
    copies: int, experts: int, ranks: int
):
    total = torch.zeros(experts, dtype=torch.int64)
    for source in range(ranks):
        chosen = balanced_experts(copies, experts, source, CPU)
        counts = torch.bincount(chosen, minlength=experts)
        assert counts.tolist() == balanced_counts(copies, experts, source)
        total += counts
    assert int(total.max() - total.min()) <= 1
    assert (copies * ranks) % experts or len(set(total.tolist())) == 1


@given(choices)
def test_an_assignment_sorts_every_copy_by_expert_and_keeps_the_order_of_tokens(chosen: tuple[int, list[int]]):
    experts, of_copies = chosen
    found = assign(torch.tensor(of_copies), torch.bincount(torch.tensor(of_copies), minlength=experts))
    assert [(of_copies[c], c) for c in found.copies.tolist()] == sorted((e, c) for c, e in enumerate(of_copies))


@given(choices, st.integers(1, 5))
def test_a_capacity_keeps_the_first_copies_of_every_expert(chosen: tuple[int, list[int]], capacity: int):
    experts, of_copies = chosen
    found = assign_within_capacity(torch.tensor(of_copies), experts, capacity)
    assert found.rows is not None
    placed = {
        row: copy for row, copy in zip(found.rows.tolist(), found.copies.tolist(), strict=True) if row < found.total
    }
    for expert in range(experts):
        own = [c for c, e in enumerate(of_copies) if e == expert][:capacity]
        assert [placed[expert * capacity + i] for i in range(len(own))] == own
    assert len(placed) == sum(min(of_copies.count(e), capacity) for e in range(experts))


def test_capacity_is_the_even_share_times_the_factor_rounded_up():
    assert capacity_of(64, 8, 1.0) == 8
    assert capacity_of(64, 8, 1.25) == 10
    assert capacity_of(3, 8, 1.0) == 1


@given(
    st.integers(1, 4).flatmap(
        lambda e: st.lists(st.lists(st.integers(0, 4), min_size=e, max_size=e), min_size=1, max_size=5)
    )
)
def test_received_rows_are_laid_expert_by_expert_and_within_one_source_by_source(blocks: list[list[int]]):
    rows = [(e, s, i) for s, block in enumerate(blocks) for e, count in enumerate(block) for i in range(count)]
    order = order_by_expert(blocks, CPU)
    assert [rows[i] for i in (range(len(rows)) if order is None else order.tolist())] == sorted(rows)
