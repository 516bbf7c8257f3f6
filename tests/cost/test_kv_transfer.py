"""A prompt's cache between two pools: bytes against a hand count, time against a simulation of its layers, laws."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cost.test_serving import DGX_A100, config, llama_8b

from meshwright.cost.candidates import Candidates
from meshwright.cost.kv_transfer import CacheShares, cache_shares, exposed_seconds, transfer_seconds
from meshwright.cost.serving import serving_engine
from meshwright.cost.serving_pools import busy_share, queue_seconds
from meshwright.cost.workload import ServingWorkload
from meshwright.hardware.spec import Cluster, Link
from meshwright.models import load

TWO_NODES = dataclasses.replace(DGX_A100, nodes=2)


def shares(tokens: int, **sizes: int) -> CacheShares:
    one = Candidates.from_configs([config(**sizes)])
    return cache_shares(serving_engine(llama_8b(), TWO_NODES, ServingWorkload(tokens, 1), one), float(tokens))


def seconds(cluster: Cluster, reader: CacheShares, writer: CacheShares) -> float:
    return float(transfer_seconds(cluster, reader, writer)[0, 0])


def test_a_cache_is_the_keys_and_values_of_every_layer_whatever_the_split() -> None:
    whole = 1024 * 2 * 8 * 128 * 2 * 32  # tokens x (key, value) x KV heads x head size x 2 bytes x layers
    for sizes in ({}, {"tp": 2}, {"tp": 8}, {"pp": 4}, {"tp": 2, "pp": 2}):
        assert shares(1024, **sizes).replica_bytes[0] == pytest.approx(whole)
    assert shares(1024, tp=16).replica_bytes[0] == pytest.approx(2 * whole)  # two ranks want each KV head


def test_the_busiest_rank_bounds_the_transfer() -> None:
    whole = shares(4096).replica_bytes[0]
    per_byte = 1.0 / (TWO_NODES.inter.bandwidth * TWO_NODES.inter.efficiency)
    one_by_one = seconds(TWO_NODES, shares(4096), shares(4096))
    assert one_by_one == pytest.approx(whole * per_byte, rel=0.05)
    assert seconds(TWO_NODES, shares(4096, tp=4), shares(4096)) == pytest.approx(one_by_one, rel=0.01)
    assert seconds(TWO_NODES, shares(4096), shares(4096, tp=4)) == pytest.approx(one_by_one, rel=0.01)
    assert seconds(TWO_NODES, shares(4096, tp=4), shares(4096, tp=2)) == pytest.approx(one_by_one / 2, rel=0.05)
    assert seconds(TWO_NODES, shares(4096, tp=4), shares(4096, tp=4)) == pytest.approx(one_by_one / 4, rel=0.05)
    one_node = dataclasses.replace(DGX_A100, nodes=1)
    assert seconds(one_node, shares(4096), shares(4096)) < one_by_one / 5  # over NVLink


def test_every_rank_of_a_latent_takes_a_whole_copy() -> None:
    model = load("deepseek-v3")
    pair = Candidates.from_configs([config(), config(tp=4)])
    found = cache_shares(serving_engine(model, TWO_NODES, ServingWorkload(1024, 1), pair), 1024.0)
    assert found.rank_bytes[0] == found.rank_bytes[1] == 1024 * 576 * 2 * 61
    assert found.replica_bytes[1] == 4 * found.replica_bytes[0]


@settings(max_examples=25, deadline=None)
@given(
    prompt=st.integers(1, 30_000),
    more=st.integers(1, 30_000),
    reader=st.sampled_from([1, 2, 4, 8]),
    writer=st.sampled_from([1, 2, 4, 8]),
    slower=st.floats(1.0, 100.0),
)
def test_longer_prompts_and_slower_links_never_take_less(
    prompt: int, more: int, reader: int, writer: int, slower: float
) -> None:
    def of(tokens: int, link: Link) -> float:
        cluster = dataclasses.replace(TWO_NODES, inter=link)
        return seconds(cluster, shares(tokens, tp=reader), shares(tokens, tp=writer))

    link = TWO_NODES.inter
    worse = dataclasses.replace(link, bandwidth=link.bandwidth / slower)
    endless = dataclasses.replace(link, bandwidth=1e30)
    assert of(prompt, link) <= of(prompt + more, link)
    assert of(prompt, endless) <= of(prompt, link) <= of(prompt, worse)


@given(layers=st.integers(1, 100), transfer=st.floats(1e-6, 10.0), reading=st.floats(1e-6, 10.0))
def test_layer_by_layer_is_a_flow_shop_of_two_machines(layers: int, transfer: float, reading: float) -> None:
    computed = sent = 0.0
    for _ in range(layers):
        computed += reading / layers
        sent = max(sent, computed) + transfer / layers
    found = float(exposed_seconds(np.array(transfer), np.array(reading), layers, by_layer=True))
    assert found == pytest.approx(sent - reading, rel=1e-6, abs=1e-9)
    assert found <= float(exposed_seconds(np.array(transfer), np.array(reading), layers, by_layer=False)) * (1 + 1e-9)


@given(beat=st.floats(1e-3, 10.0), busy=st.floats(0.0, 0.99))
def test_the_busy_share_is_the_one_whose_wait_was_asked_for(beat: float, busy: float) -> None:
    one = np.array([beat])
    wait = queue_seconds(one, np.array([busy]))
    assert float(busy_share(one, wait)[0]) == pytest.approx(busy, abs=1e-9)
    assert float(busy_share(one, -wait - 1.0)[0]) == 0.0


def test_the_mean_wait_is_that_of_a_simulated_queue() -> None:
    """Poisson arrivals, constant service: Lindley's recursion over many arrivals."""
    draw = np.random.default_rng(5)
    for busy in (0.3, 0.7):
        gaps = draw.exponential(1.0 / busy, 400_000)
        waits, now = np.zeros(len(gaps)), 0.0
        for i, gap in enumerate(gaps):
            now = max(0.0, now + 1.0 - gap)
            waits[i] = now
        assert float(queue_seconds(np.array(1.0), np.array(busy))) == pytest.approx(waits.mean(), rel=0.03)
