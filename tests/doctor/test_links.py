"""Links: the fit finds what the samples were made with, slow ones are attributed, the cluster file reads back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meshwright import hardware
from meshwright.cost.collectives import call_seconds
from meshwright.cost.device import network
from meshwright.doctor.cluster_file import write_cluster
from meshwright.doctor.links import measured_cluster, report_links, shape_of, slow_links
from meshwright.hardware import Link
from meshwright.ledger import Collective
from meshwright.measurements import LinkSample, LinkSamples


def samples(intra: Link, inter: Link, hosts: tuple[str, ...]) -> LinkSamples:
    """Two hosts of two ranks: tp within, dp across, priced by the cost model."""
    truth = replace(hardware.load("cpu", nodes=2, gpus_per_node=2), intra=intra, inter=inter)
    made: list[LinkSample] = []
    for axis, groups, stride in (("tp", ((0, 1), (2, 3)), 1), ("dp", ((0, 2), (1, 3)), 2)):
        for collective in (Collective.ALL_REDUCE, Collective.ALL_GATHER, Collective.SEND):
            for nbytes in (4, 2**16, 2**22):
                taken = call_seconds(
                    collective, truth, network(), np.array([2]), np.array([stride]), np.array([float(nbytes)])
                )
                for ranks in groups:
                    where = tuple(sorted({hosts[r] for r in ranks}))
                    made.append(LinkSample(axis, collective.value, ranks, where, nbytes, float(taken[0])))
    return LinkSamples(hosts, tuple(made), "made up")


def test_the_fit_finds_the_links_that_the_samples_were_made_with():
    intra, inter = Link("fast", 2e9, 50e-6, 1.0), Link("slow", 25e6, 300e-6, 1.0)
    measured = samples(intra, inter, ("a", "a", "b", "b"))
    report = report_links(measured, shape_of(measured, hardware.load("cpu"), None))
    assert report.intra.bandwidth == pytest.approx(intra.bandwidth, rel=0.1)
    assert report.intra.latency_s == pytest.approx(intra.latency_s, rel=0.1)
    assert report.inter is not None
    assert report.inter.bandwidth == pytest.approx(inter.bandwidth, rel=0.1)
    assert report.error < 0.1


def test_a_measured_cluster_is_written_and_read_back(tmp_path: Path):
    measured = samples(Link("fast", 2e9, 50e-6, 1.0), Link("slow", 25e6, 3e-4, 1.0), ("a", "a", "b", "b"))
    shape = shape_of(measured, hardware.load("cpu"), 2.0)
    made = measured_cluster(report_links(measured, shape), shape, "here")
    write_cluster(made, 'by a test\n[of "quotes"]', tmp_path / "here.toml")
    read = hardware.load(tmp_path / "here.toml")
    assert (read.nodes, read.gpus_per_node, read.shared_cores) == (2, 2, 2.0)
    assert read.inter.bandwidth == pytest.approx(made.inter.bandwidth, rel=1e-5)
    assert read.accelerator == made.accelerator


def pair(a: int, b: int, hosts: tuple[str, ...], seconds: float) -> LinkSample:
    return LinkSample("pair", "send", (a, b), tuple(sorted({hosts[a], hosts[b]})), 2**20, seconds)


HOSTS = ("a", "a", "b", "b", "c", "c", "d", "d")


def pairs(slow: set[tuple[int, int]]) -> LinkSamples:
    both = [(i, j) for i in range(8) for j in range(i + 1, 8)]
    drawn = np.random.default_rng(1)
    return LinkSamples(
        HOSTS, tuple(pair(i, j, HOSTS, (5e-3 if (i, j) in slow else 1e-3) * drawn.uniform(0.8, 1.25)) for i, j in both)
    )


def test_one_slow_pair_is_a_slow_link():
    (found,) = slow_links(pairs({(1, 6)}))
    assert (found.kind, found.ranks) == ("link", (1, 6))


def test_a_host_all_of_whose_links_are_slow_is_the_slow_host():
    slow = {(i, j) for i in range(8) for j in range(i + 1, 8) if (HOSTS[i] == "c") != (HOSTS[j] == "c")}
    (found,) = slow_links(pairs(slow))
    assert (found.kind, found.name, found.ranks) == ("host", "c", (4, 5))


def test_a_rank_all_of_whose_links_are_slow_is_the_slow_rank():
    slow = {(i, j) for i in range(8) for j in range(i + 1, 8) if 3 in (i, j)}
    (found,) = slow_links(pairs(slow))
    assert (found.kind, found.ranks) == ("rank", (3,))


def test_even_links_are_not_slow():
    assert slow_links(pairs(set())) == []
