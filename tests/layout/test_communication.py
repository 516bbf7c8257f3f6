"""The communication pattern of every axis."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.layout.sizes import configs

from meshwright.layout import (
    ContextVariant,
    HybridParallelConfig,
    analyze_communication_patterns,
    communication_patterns,
    rank_layout,
    with_ledger,
)
from meshwright.layout.communication import fewest_sharing


def test_axes_of_the_guides_example_with_every_data_parallel_group_counted():
    config = HybridParallelConfig(dp=4, tp=4, pp=4)
    found = {p.axis: p for p in communication_patterns(config, domain=8)}
    assert list(found) == ["tp", "pp", "dp", "embedding"]
    assert (found["tp"].groups, found["tp"].group_size) == (16, 4)
    assert (found["pp"].groups, found["pp"].group_size) == (16, 4)
    assert (found["dp"].groups, found["dp"].group_size) == (16, 4)
    assert found["tp"].inside_domain
    assert not found["dp"].inside_domain
    assert (found["tp"].demand, found["pp"].demand, found["dp"].demand) == ("HIGH", "MEDIUM", "LOW")


@given(configs(), st.integers(1, 16))
def test_groups_times_size_is_the_world_and_demand_falls_with_frequency(config: HybridParallelConfig, domain: int):
    patterns = communication_patterns(config, domain=domain)
    for p in patterns:
        assert p.group_size > 1
        assert 1 <= p.members_per_domain <= p.group_size
        if p.axis != "embedding":
            assert p.groups * p.group_size == config.world_size
    order = ["HIGH", "MEDIUM", "LOW"]
    ranked = [order.index(p.demand) for p in patterns]
    assert ranked == sorted(ranked)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(1, 5))
def test_members_sharing_a_domain_are_counted_as_brute_force_does(count: int, size: int, domain: int, stride: int):
    groups = np.arange(count)[:, None] * size * stride + np.arange(size)[None, :] * stride
    brute = min(sum(int(o) // domain == int(m) // domain for o in group) for group in groups for m in group)
    assert fewest_sharing(groups, domain) == brute


def test_how_the_step_is_run_changes_the_words():
    sharded = {p.axis: p for p in communication_patterns(HybridParallelConfig(dp=4, tp=2, zero=3))}
    assert "all-gather of weights" in sharded["dp"].collective
    assert sharded["dp"].demand == "HIGH"
    sequence = communication_patterns(HybridParallelConfig(tp=2, sequence_parallel=True))
    assert sequence[0].collective == "all-gather + reduce-scatter"
    moe = {p.axis: p for p in communication_patterns(HybridParallelConfig(dp=4, tp=2, ep=4))}
    assert moe["ep"].collective == "all-to-all"
    assert moe["expert_dp"].group_size == 2


def test_gradients_are_reduced_over_context_parallel_ranks_too():
    found = {p.axis: p for p in communication_patterns(HybridParallelConfig(dp=2, cp=4, tp=2))}
    assert (found["dp"].groups, found["dp"].group_size) == (2, 8)


def test_context_parallel_names_its_variant():
    def words(variant: ContextVariant) -> str:
        (cp,) = [p for p in communication_patterns(HybridParallelConfig(cp=4, cp_variant=variant)) if p.axis == "cp"]
        return cp.collective

    assert "ring" in words(ContextVariant.RING)
    assert words(ContextVariant.ALL_TO_ALL).startswith("all-to-all of queries, keys and values")


def test_other_orders_move_axes_between_links():
    config = HybridParallelConfig(dp=4, pp=4, tp=2)
    default = {p.axis: p for p in communication_patterns(config, domain=8)}
    megatron = {p.axis: p for p in communication_patterns(rank_layout(config, "megatron"), domain=8)}
    assert default["pp"].inside_domain
    assert not megatron["pp"].inside_domain
    assert megatron["dp"].inside_domain


@dataclass(frozen=True)
class Line:
    axis: str
    calls: int
    total_bytes: int


def test_a_ledger_fills_in_calls_and_bytes():
    patterns = communication_patterns(HybridParallelConfig(dp=2, tp=2))
    filled = {p.axis: p for p in with_ledger(patterns, [Line("tp", 3, 300), Line("tp", 1, 200), Line("cp", 1, 9)])}
    assert (filled["tp"].calls_per_step, filled["tp"].bytes_per_call) == (4, 125)
    assert filled["dp"].bytes_per_call is None


def test_guides_function_prints_and_returns(capsys: pytest.CaptureFixture[str]):
    patterns = analyze_communication_patterns(HybridParallelConfig(dp=4, tp=4, pp=4))
    printed = capsys.readouterr().out
    assert "dp: 16 groups of 4, e.g. [0, 16, 32, 48]" in printed
    assert all(p.bytes_formula in printed for p in patterns)
    assert analyze_communication_patterns(HybridParallelConfig()) == ()
