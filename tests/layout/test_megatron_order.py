"""Megatron-core's grids: against brute force, and against the examples that its docstrings and tests publish
(megatron/core/parallel_state.py and tests/unit_tests/test_parallel_state.py of NVIDIA/Megatron-LM)."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.layout.sizes import brute_groups, configs

from meshwright.errors import InputError
from meshwright.layout import HybridParallelConfig, rank_layout

ORDERS = ["-".join(p) for p in permutations(("tp", "cp", "ep", "dp", "pp"))]


def groups(config: HybridParallelConfig, order: str, name: str) -> list[list[int]]:
    return rank_layout(config, order).groups(name).tolist()


@given(configs(), st.sampled_from(ORDERS))
def test_any_order_string_gives_the_grids_of_brute_force(config: HybridParallelConfig, order: str):
    dense = {"tp": config.tp, "cp": config.cp, "ep": 1, "dp": config.dp, "pp": config.pp}
    expert = {"tp": config.expert_tp, "cp": 1, "ep": config.ep, "dp": config.expert_dp, "pp": config.pp}
    consistent = brute_groups(order, dense, {"pp"}) == brute_groups(order, expert, {"pp"})
    if not consistent and config.ep * config.expert_tp > 1:
        with pytest.raises(InputError, match="put pp last"):
            rank_layout(config, order)
        return
    for name in ("tp", "cp", "dp", "pp", "dp-cp", "tp-pp", "tp-dp", "tp-dp-cp"):
        assert groups(config, order, name) == brute_groups(order, dense, set(name.split("-")))
    if not consistent:
        with pytest.raises(InputError, match="put pp last"):
            rank_layout(config, order).groups("ep")
        return
    for name, axes in (
        ("ep", {"ep"}),
        ("expert_tp", {"tp"}),
        ("expert_dp", {"dp"}),
        ("ep_expert_tp", {"ep", "tp"}),
        ("pp-ep-expert_tp", {"pp", "ep", "tp"}),
    ):
        assert groups(config, order, name) == brute_groups(order, expert, axes)


def test_docstring_example_of_16_gpus_with_tp_2_and_pp_4():
    config = HybridParallelConfig(dp=2, tp=2, pp=4)
    assert groups(config, "megatron", "dp") == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    assert groups(config, "megatron", "tp") == [[i, i + 1] for i in range(0, 16, 2)]
    assert groups(config, "megatron", "pp") == [[i, i + 4, i + 8, i + 12] for i in range(4)]


def test_docstring_examples_of_the_group_generator():
    assert groups(HybridParallelConfig(dp=2, tp=2, pp=2), "tp-pp-dp", "dp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    generated = groups(HybridParallelConfig(dp=3, tp=2, pp=4), "tp-dp-pp", "dp")
    assert (generated[0], generated[1], generated[7]) == ([0, 2, 4], [1, 3, 5], [19, 21, 23])


def test_docstring_example_of_context_parallel():
    config = HybridParallelConfig(tp=4, cp=2)
    assert groups(config, "megatron", "cp") == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize("order", ["tp-cp-ep-dp-pp", "tp-cp-pp-ep-dp"])
def test_pipeline_neighbours_of_its_unit_test(order: str):
    """8 ranks, tp 2, pp 4, either order: first stage is rank % 2, next is rank + 2, dp is the rank alone."""
    layout = rank_layout(HybridParallelConfig(tp=2, pp=4), order)
    for rank in range(8):
        pipeline = layout.group_of(rank, "pp").tolist()
        assert pipeline[0] == rank % 2
        assert pipeline[(pipeline.index(rank) + 1) % 4] == (rank + 2) % 8
        assert layout.group_of(rank, "dp").tolist() == [rank]


PUBLISHED_SHAPES = [  # (world, tp, pp, cp, ep) of test_rank_generator_for_tp_dp_pp
    (8, 8, 1, 1, 1),
    (8, 2, 4, 1, 1),
    (24, 8, 3, 1, 1),
    (64, 2, 1, 1, 4),
    (64, 2, 2, 2, 4),
    (64, 2, 1, 4, 8),
    (64, 2, 2, 2, 8),
    (128, 4, 8, 1, 4),
    (128, 4, 8, 4, 1),
    (256, 8, 8, 4, 1),
    (512, 4, 2, 8, 8),
    (2528, 4, 8, 1, 1),
    (10752, 4, 8, 1, 1),
]


@pytest.mark.parametrize(("world", "tp", "pp", "cp", "ep"), PUBLISHED_SHAPES)
def test_groups_of_its_unit_test_follow_the_closed_forms_it_checks_against(
    world: int, tp: int, pp: int, cp: int, ep: int
):
    """With pp last: a stage is a run of world / pp ranks; within it tp strides 1, cp tp, dp tp x cp; experts (where
    expert_tp = tp) stride ep by tp and expert dp by tp x ep."""
    config = HybridParallelConfig(dp=world // (tp * pp * cp), tp=tp, pp=pp, cp=cp, ep=ep, expert_tp=tp)
    layout = rank_layout(config, "tp-cp-ep-dp-pp")
    stage = world // pp
    starts = [i * stage for i in range(pp)]
    dp = [list(range(s + j, s + stage, tp * cp)) for s in starts for j in range(tp * cp)]
    with_cp = [list(range(s + j, s + stage, tp)) for s in starts for j in range(tp)]
    tensor_expert = [list(range(i, i + tp * ep)) for i in range(0, world, tp * ep)]
    expert_dp = [list(range(s + j, s + stage, tp * ep)) for s in starts for j in range(tp * ep)]
    model = [[s + i * tp + j for s in starts for j in range(tp)] for i in range(stage // tp)]
    assert layout.groups("tp").tolist() == [list(range(i, i + tp)) for i in range(0, world, tp)]
    assert layout.groups("pp").tolist() == [list(range(i, world, stage)) for i in range(stage)]
    assert layout.groups("dp").tolist() == dp
    assert layout.groups("dp-cp").tolist() == with_cp
    assert layout.groups("model").tolist() == model
    assert layout.groups("ep_expert_tp").tolist() == tensor_expert
    assert layout.groups("expert_dp").tolist() == expert_dp


def test_orders_with_pp_inside_dp_give_the_same_groups_where_dp_is_one():
    """Its test of different orders: sizes that leave dp = 1 (or pp = 1) make tp-ep-dp-pp and tp-pp-ep-dp agree."""
    for tp, pp, ep in ((1, 8, 1), (2, 4, 1), (4, 2, 1), (8, 1, 1), (4, 1, 2), (1, 1, 8), (1, 1, 2), (2, 1, 4)):
        config = HybridParallelConfig(dp=8 // (tp * pp), tp=tp, pp=pp, ep=ep, expert_tp=tp if ep * tp <= 8 else 1)
        first, second = rank_layout(config, "tp-ep-dp-pp"), rank_layout(config, "tp-pp-ep-dp")
        for name in ("tp", "dp", "pp", "cp", "model", "expert_dp", "ep_expert_tp"):
            assert np.array_equal(first.groups(name), second.groups(name)), (tp, pp, ep, name)


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ("tp-dp", "does not place pp, whose size is 2"),
        ("tp-tp-dp-pp", "names tp twice"),
        ("tp-xx-pp", "no axis 'xx'"),
    ],
)
def test_orders_that_do_not_place_every_axis_once_are_refused(order: str, words: str):
    with pytest.raises(InputError, match=words):
        rank_layout(HybridParallelConfig(dp=2, tp=2, pp=2), order)
