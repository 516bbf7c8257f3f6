"""The rank map as text."""

import re

from hypothesis import given
from hypothesis import strategies as st
from tests.layout.sizes import configs

from meshwright.layout import HybridParallelConfig, rank_layout, rank_map
from meshwright.layout.draw import replica_ranks


def test_map_of_the_guides_example_shows_replicas_stages_and_nodes():
    text = rank_map(HybridParallelConfig(dp=4, tp=4, pp=4), gpus_per_node=8)
    assert "64 ranks on 8 nodes of 8" in text
    assert "replica dp=1\n  stage pp=0: [16 17 18 19]  node 2\n" in text
    assert text.count("stage pp=") == 16


def test_node_boundaries_inside_a_group_are_drawn():
    text = rank_map(HybridParallelConfig(tp=8), gpus_per_node=4)
    assert "[0 1 2 3 | 4 5 6 7]  nodes 0 to 1" in text


def test_context_parallel_ranks_are_bracketed_apart():
    assert "(0 1) (2 3)" in rank_map(HybridParallelConfig(tp=2, cp=2))


def test_huge_jobs_are_elided_but_keep_their_ends():
    config = HybridParallelConfig(dp=1024, pp=16, tp=8)
    text = rank_map(config)
    assert len(text) < 10_000
    assert "... 1020 more replicas" in text
    assert "... 8 more stages" in text
    assert "131071" in text


@given(configs(), st.sampled_from(["default", "megatron"]))
def test_replicas_hold_every_rank_once_and_the_map_shows_them(config: HybridParallelConfig, order: str):
    layout = rank_layout(config, order)
    ranks = [r for replica in range(config.dp) for r in replica_ranks(layout, replica).ravel().tolist()]
    assert sorted(ranks) == list(range(config.world_size))
    text = rank_map(layout, gpus_per_node=8)
    shown = [
        int(n)
        for line in text.splitlines()[1:]
        if "stage" in line
        for n in re.findall(r"\d+", line.split(":")[1].split("node")[0])
    ]
    assert set(shown) <= set(range(config.world_size))
    if config.dp <= 4 and config.cp * config.tp <= 16:
        assert sorted(shown) == list(range(config.world_size))


def test_vllm_replicas_are_drawn_engine_by_engine():
    layout = rank_layout(HybridParallelConfig(dp=4, tp=2, ep=4), "vllm")
    assert replica_ranks(layout, 3).ravel().tolist() == [6, 7]
