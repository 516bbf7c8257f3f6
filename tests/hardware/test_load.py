"""Clusters in the size a job wants, and clusters from bare facts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright import hardware
from meshwright.errors import InputError


def test_overrides_of_size():
    assert hardware.load("h100-sxm").gpus == 8
    assert hardware.load("h100-sxm", nodes=8).gpus == 64
    assert hardware.load("h100-sxm", gpus=128).nodes == 16
    small = hardware.load("h100-sxm", gpus=4)
    assert (small.nodes, small.gpus_per_node, small.domain) == (1, 4, 4)
    four = hardware.load("h100-sxm", nodes=3, gpus_per_node=4)
    assert (four.gpus, four.domain) == (12, 4)
    spread = hardware.load("h100-sxm", nodes=4, gpus=16)
    assert (spread.nodes, spread.gpus_per_node) == (4, 4)
    assert hardware.load("h100-sxm", nodes=2, gpus=16, gpus_per_node=8).gpus == 16


def test_rack_domains_survive_overrides():
    rack = hardware.load("gb200-nvl72")
    assert (rack.gpus, rack.domain) == (72, 72)
    assert hardware.load("gb200-nvl72", gpus=256).domain == 72
    assert hardware.load("gb200-nvl72", nodes=2).gpus == 8
    assert hardware.load("gb200-nvl72", gpus=2).gpus == 2


def test_adapters_are_shared_by_the_devices_of_a_node():
    assert hardware.load("a800").inter.bandwidth == 12.5e9
    assert hardware.load("h100-sxm").inter.bandwidth == 50e9
    assert hardware.load("mi250x").inter.bandwidth == 12.5e9


def test_reserved_memory_and_oversubscription_can_be_stated():
    cluster = hardware.load("h100-sxm", reserved_bytes=0, oversubscription=7.0)
    assert cluster.usable_bytes == cluster.accelerator.memory_bytes
    assert cluster.oversubscription == 7.0


@given(st.integers(1, 4096), st.sampled_from(["h100-sxm", "gb200-nvl72", "v100-4gpu", "cpu"]))
def test_any_number_of_gpus_is_met_exactly_or_refused_with_two_that_are(gpus: int, name: str):
    try:
        assert hardware.load(name, gpus=gpus).gpus == gpus
    except InputError as error:
        tries = str(error).split("try ")[1].split(" or ")
        for choice in tries:
            assert hardware.load(name, gpus=int(choice)).gpus == int(choice)
        assert int(tries[0]) < gpus < int(tries[1])


@pytest.mark.parametrize("name", ["nodes", "gpus", "gpus_per_node"])
@pytest.mark.parametrize("value", [0, -1, 10**12, True, "8", 2.5, float("inf")])
def test_counts_that_are_none_are_refused(name: str, value: object):
    with pytest.raises(InputError, match=r"must be (a whole number|between 1 and 10,000,000), got"):
        hardware.load("h100-sxm", **{name: value})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"gpus": 12}, "12 GPUs do not fill whole nodes of 8 .h100-sxm.; try 8 or 16"),
        ({"gpus": 24, "nodes": 2}, "24 GPUs do not spread over 2 nodes of 8; they hold 16"),
        ({"gpus": 15, "nodes": 2}, "do not spread"),
        ({"gpus": 24, "nodes": 2, "gpus_per_node": 8}, "24 GPUs are not 2 nodes of 8"),
        ({"nodes": 10_000_000}, "gpus must be between"),
        ({"reserved_bytes": 10**12}, "leaves nothing"),
        ({"reserved_bytes": -1}, "reserved_bytes must be a number zero or more"),
        ({"oversubscription": 0.5}, "oversubscription is 1 .full bisection. or more"),
        ({"oversubscription": float("nan")}, "oversubscription must be a number above zero"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(overrides: dict, words: str):
    with pytest.raises(InputError, match=words) as error:
        hardware.load("h100-sxm", **overrides)
    assert "\n" not in str(error.value)


def test_clusters_from_the_guides_bare_facts():
    nvlink = hardware.custom(80, "nvlink", 32)
    assert (nvlink.gpus, nvlink.domain, nvlink.accelerator.name) == (32, 8, "a100-80gb-sxm")
    assert (nvlink.intra.name, nvlink.inter.name) == ("nvlink3", "ib-hdr")
    infiniband = hardware.custom(80, "infiniband", 128)
    assert (infiniband.nodes, infiniband.intra.name, infiniband.inter.name) == (16, "pcie4", "ib-hdr")
    ethernet = hardware.custom(24, "ethernet", 2)
    assert (ethernet.nodes, ethernet.gpus_per_node, ethernet.accelerator.name) == (1, 2, "a10")
    assert ethernet.inter.bandwidth < infiniband.inter.bandwidth < nvlink.inter.bandwidth


def test_bare_facts_may_name_the_device_or_a_size_that_none_has():
    assert hardware.custom(80, "nvlink", 8, accelerator="h100").intra.name == "nvlink4"
    assert hardware.custom(64, "nvlink", 8).accelerator.memory_bytes == 64_000_000_000
    assert hardware.custom(24, "nvlink", 8).intra.name == "nvlink3"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ((80, "nvlnk", 8), "unknown interconnect 'nvlnk'"),
        ((0, "nvlink", 8), "gpu_memory_gb must be between"),
        ((float("nan"), "nvlink", 8), "gpu_memory_gb must be between"),
        ((80, "nvlink", 0), "gpus must be between"),
        ((80, "nvlink", 12), "do not fill whole nodes"),
    ],
)
def test_bare_facts_that_make_no_cluster_are_refused(facts: tuple, words: str):
    with pytest.raises(InputError, match=words):
        hardware.custom(*facts)
