"""Two pools: rates matched as brute force matches them, targets kept, published online rates, laws of the link."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.planner.toys import cluster, dense, moe

from meshwright import hardware
from meshwright.cost.candidates import Candidates
from meshwright.cost.serving import serving_engine
from meshwright.cost.serving_pass import Engine
from meshwright.cost.serving_pools import reading_replicas, writing_replicas
from meshwright.cost.serving_stack import serving_stacks
from meshwright.cost.workload import ServingWorkload
from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig, Precision
from meshwright.models import load
from meshwright.planner.constraints import Constraints
from meshwright.planner.disaggregated import disaggregated_search, matched_units
from meshwright.planner.pool_candidates import pool_candidates

CHAT = ServingWorkload(prompt=1024, output=256)


@settings(max_examples=60, deadline=None)
@given(
    gpus=st.integers(2, 40),
    reader=st.integers(1, 9),
    writer=st.integers(1, 9),
    reads=st.floats(0.01, 100.0),
    writes=st.floats(0.01, 100.0),
)
def test_units_are_matched_as_trying_all_numbers_matches_them(
    gpus: int, reader: int, writer: int, reads: float, writes: float
) -> None:
    units, others, rate = matched_units(
        gpus, np.array([reader]), np.array([writer]), np.array([[reads]]), np.array([[writes]])
    )
    tried = [
        min(a * reads, b * writes)
        for a in range(gpus // reader + 1)
        for b in range(gpus // writer + 1)
        if a * reader + b * writer <= gpus
    ]
    assert rate[0, 0] == max(tried)
    assert min(units[0, 0] * reads, others[0, 0] * writes) == rate[0, 0]
    assert units[0, 0] * reader + others[0, 0] * writer <= gpus


@pytest.mark.parametrize("sparse", [False, True])
def test_targets_hold_and_pools_share_the_cluster(sparse: bool) -> None:
    work = replace(CHAT, ttft_s=0.5, tpot_s=0.02)
    found = disaggregated_search(moe() if sparse else dense(), cluster(16), work, top=20)
    assert found.best
    for plan in found.best:
        assert plan.ttft_s <= 0.5 * (1 + 1e-9)
        assert plan.tpot_s <= 0.02
        assert plan.prefill.busy <= serving_stacks()["vllm"].occupancy + 1e-9
        assert plan.prefill.config.world_size + plan.decode.config.world_size + plan.idle_gpus == 16
        assert plan.idle_gpus >= 0
        assert plan.decode.config.pp == 1  # vLLM
        for config in (plan.prefill.config, plan.decode.config):
            if config.ep > 1:
                assert config.dp * config.tp % config.ep == 0
    rates = [plan.tokens_per_s_per_gpu for plan in found.best]
    assert all(a >= b * 0.998 for a, b in pairwise(rates))


def test_a_pair_moves_no_more_than_its_pools_and_its_link_can() -> None:
    machine = replace(cluster(16), inter=replace(cluster(16).inter, bandwidth=2e8))
    found = disaggregated_search(dense(), machine, CHAT, top=1).best[0]
    assert found.limit == "link"
    replicas = min(found.prefill.config.dp, found.decode.config.dp)
    assert found.requests_per_s <= replicas / found.transfer.transfer_s * (1 + 1e-9)


@settings(max_examples=6, deadline=None)
@given(slower=st.floats(1.0, 1000.0), prompt=st.sampled_from([128, 1024, 3000]), target=st.sampled_from([None, 0.3]))
def test_a_slower_link_never_helps_and_sending_by_layer_never_hurts(
    slower: float, prompt: int, target: float | None
) -> None:
    machine = cluster(16)
    worse = replace(machine, inter=replace(machine.inter, bandwidth=machine.inter.bandwidth / slower))
    endless = replace(machine, inter=replace(machine.inter, bandwidth=1e30))
    only = Constraints(tp=(1, 2), pp=(1,))  # whose own traffic stays inside a node
    work = ServingWorkload(prompt, 64, ttft_s=target)

    def rate(where: hardware.Cluster, by_layer: bool = False) -> float:
        found = disaggregated_search(dense(), where, work, top=1, constraints=only, by_layer=by_layer)
        return found.best[0].requests_per_s if found.best else 0.0

    assert rate(worse) <= rate(machine) * 1.002 <= rate(endless) * 1.005
    assert rate(worse) <= rate(worse, by_layer=True) * 1.002


def test_the_published_rates_of_deepseeks_two_pools() -> None:
    """open-infra-index, day 6: a prefill node of H800 (EP32) reads 73,700 tokens/s, 56.3 % of them found in the cache;
    a decode node (EP144, contexts of 4,989, 20 to 22 tokens/s per user) writes 14,800. It has copies of busy experts;
    its decode overlaps two batches and sends fp8, which is not modelled. 128 ranks hold two of 256 experts here."""
    model = load("deepseek-v3")
    balanced = replace(serving_stacks()["vllm"], expert_imbalance=1.0)

    def engine(nodes: int, work: ServingWorkload) -> Engine:
        ranks = 8 * nodes
        config = HybridParallelConfig(dp=ranks, ep=ranks, global_batch=ranks, precision=Precision.FP8)
        one = Candidates.from_configs([config])
        return serving_engine(model, hardware.load("h800", nodes=nodes), work, one, balanced)

    reads = ServingWorkload(4096, 1000, prefix_hit_rate=0.563)
    pool = reading_replicas(engine(4, reads), reads, np.array([2.0]))
    assert 8 * 2 * 4096 / pool.beat_s[0] == pytest.approx(73_700, rel=0.1)
    writes = ServingWorkload(4489, 1000, tpot_s=0.048)
    assert 0.5 * 14_800 < 8 * writing_replicas(engine(16, writes), writes).tokens_per_s[0] < 14_800


def test_units_of_experts_are_one_engine_of_vllm() -> None:
    found = pool_candidates(moe(), cluster(16), Constraints())
    assert (found.world < 16).all()
    spread = found.ep > 1
    assert (found.ep[spread] == (found.dp * found.tp)[spread]).all()
    assert (found.dp[~spread] == 1).all()
    assert spread.any()


def test_the_reason_says_whether_two_pools_pay() -> None:
    model, machine = load("llama-3.1-70b"), cluster(8)
    pays = disaggregated_search(model, machine, replace(CHAT, tpot_s=0.03), top=1)
    assert pays.gain is not None
    assert pays.gain > 1
    assert "two pools are" in pays.sentence
    alone = disaggregated_search(model, machine, replace(CHAT, prompt=64, output=1024), top=1)
    assert alone.gain is not None
    assert alone.gain < 1
    assert "one pool is" in alone.sentence


def test_what_two_pools_cannot_be_is_one_line() -> None:
    with pytest.raises(InputError, match="two GPUs"):
        disaggregated_search(dense(), cluster(1), CHAT)
    with pytest.raises(InputError, match="legal"):
        disaggregated_search(dense(), cluster(2), CHAT, constraints=Constraints(pp=(2,)))
    hopeless = disaggregated_search(dense(), cluster(8), replace(CHAT, tpot_s=1e-6))
    assert hopeless.best == ()
    assert "keep the targets" in hopeless.sentence
