"""Laws of the collective prices, and the bus bandwidths they must reproduce."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cost.collectives import Network, call_seconds
from meshwright.hardware.spec import Accelerator, Cluster, Link
from meshwright.ledger import Collective

GPU = Accelerator("test", 80 * 2**30, 3.35e12, {"bf16": 989e12}, 132, "hopper")
CLUSTER = Cluster(
    "test", GPU, 64, 8, 8, Link("nvlink", 450e9, 1e-6, 0.8), Link("ib", 50e9, 5e-6, 0.8), oversubscription=1.0
)
RINGLESS = (Collective.SEND, Collective.RECEIVE)


def seconds(kind: Collective, cluster: Cluster, size: int, stride: int, nbytes: float) -> float:
    """One call as a float."""
    return float(
        call_seconds(kind, cluster, Network(), np.array([size]), np.array([stride]), np.array([float(nbytes)]))[0]
    )


def test_a_group_of_one_costs_nothing() -> None:
    assert all(seconds(kind, CLUSTER, 1, 1, 1e9) == 0.0 for kind in Collective)


def test_a_large_all_reduce_in_a_node_reaches_the_ring_bound() -> None:
    nbytes = 4e9
    ideal = 2 * 7 / 8 * nbytes / (450e9 * 0.8)
    assert seconds(Collective.ALL_REDUCE, CLUSTER, 8, 1, nbytes) == pytest.approx(ideal, rel=0.01)


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather_for_large_messages() -> None:
    whole = seconds(Collective.ALL_REDUCE, CLUSTER, 64, 1, 1e10)
    parts = seconds(Collective.REDUCE_SCATTER, CLUSTER, 64, 1, 1e10) + seconds(
        Collective.ALL_GATHER, CLUSTER, 64, 1, 1e10
    )
    assert whole == pytest.approx(parts, rel=0.02)


def test_a_small_all_reduce_over_many_nodes_takes_the_tree() -> None:
    few, many = (seconds(Collective.ALL_REDUCE, CLUSTER, size, 8, 1024) for size in (8, 64))
    assert many < 3 * few  # logarithmic, not eight times


def test_members_of_a_node_share_the_work_of_leaving_it() -> None:
    spread = seconds(Collective.ALL_GATHER, CLUSTER, 8, 8, 1e10)
    packed = seconds(Collective.ALL_GATHER, CLUSTER, 64, 1, 1e10)
    assert packed < spread / 4


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(list(Collective)),
    size=st.integers(1, 512),
    stride=st.sampled_from([1, 2, 4, 8, 16, 64]),
    nbytes=st.floats(1, 1e11),
    slower=st.floats(1.0, 50.0),
)
def test_time_never_falls_when_a_link_slows(
    kind: Collective, size: int, stride: int, nbytes: float, slower: float
) -> None:
    base = seconds(kind, CLUSTER, size, stride, nbytes)
    intra = replace(CLUSTER, intra=replace(CLUSTER.intra, bandwidth=450e9 / slower))
    inter = replace(CLUSTER, inter=replace(CLUSTER.inter, bandwidth=50e9 / slower))
    late = replace(CLUSTER, inter=replace(CLUSTER.inter, latency_s=5e-6 * slower))
    crowded = replace(CLUSTER, oversubscription=slower)
    for worse in (intra, inter, late, crowded):
        assert seconds(kind, worse, size, stride, nbytes) >= base * (1 - 1e-12)


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(list(Collective)),
    size=st.integers(2, 512),
    stride=st.sampled_from([1, 8]),
    nbytes=st.floats(1, 1e10),
)
def test_time_grows_with_bytes(kind: Collective, size: int, stride: int, nbytes: float) -> None:
    assert seconds(kind, CLUSTER, size, stride, 2 * nbytes) >= seconds(kind, CLUSTER, size, stride, nbytes)


@pytest.mark.parametrize("kind", [k for k in Collective if k not in RINGLESS])
def test_a_batch_of_calls_equals_each_alone(kind: Collective) -> None:
    sizes, strides, nbytes = np.array([2, 8, 64]), np.array([8, 1, 1]), np.array([1e6, 1e8, 1e9])
    batch = call_seconds(kind, CLUSTER, Network(), sizes, strides, nbytes)
    alone = [seconds(kind, CLUSTER, int(s), int(t), float(b)) for s, t, b in zip(sizes, strides, nbytes, strict=True)]
    assert batch.tolist() == alone
