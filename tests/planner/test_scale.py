"""Scaling: points, speedups and factors that belong together."""

from __future__ import annotations

from math import prod

import pytest
from tests.planner.toys import cluster

from meshwright.cost.workload import Workload
from meshwright.models import load
from meshwright.planner.scale import scaling

WORK = Workload(seq=2048)


def test_strong_scaling_keeps_the_batch_and_loses_efficiency() -> None:
    found = scaling(load("llama-3.1-8b"), cluster(8), WORK, [64, 8, 512], 512)
    assert [p.gpus for p in found.points] == [8, 64, 512]
    assert {p.global_batch for p in found.points} == {512}
    speeds = [p.tokens_per_s for p in found.points]
    assert speeds == sorted(speeds), "more GPUs never make the whole job slower here"
    efficiencies = [p.efficiency for p in found.points]
    assert efficiencies[0] == 1.0
    assert efficiencies == sorted(efficiencies, reverse=True)


def test_weak_scaling_keeps_sequences_per_gpu() -> None:
    found = scaling(load("llama-3.1-8b"), cluster(8), WORK, [8, 64, 512], 1024, weak=True)
    assert [p.global_batch for p in found.points] == [16, 128, 1024]
    # above 1: the optimizer's state, a fifth of so short a step on 8 GPUs, is shared by more of them (64 GPUs: 1.161)
    assert all(0.7 < p.efficiency <= 1.2 for p in found.points)


def test_speedup_and_efficiency_are_those_of_the_estimates_and_factors_multiply_to_the_mfu() -> None:
    found = scaling(load("llama-3.1-8b"), cluster(8), WORK, [8, 32], 64)
    base = found.base
    assert base is not None
    for point in found.points:
        assert point.estimate is not None
        assert point.speedup == pytest.approx(point.tokens_per_s / base.tokens_per_s)
        assert point.efficiency == pytest.approx(point.speedup * base.gpus / point.gpus)
        assert prod(point.factors.values()) == pytest.approx(point.estimate.throughput.mfu)


def test_counts_on_which_nothing_fits_stay_in_the_table() -> None:
    found = scaling(load("llama-3.1-70b"), cluster(8), WORK, [8, 64], 64)
    assert found.points[0].estimate is None
    assert found.base is found.points[1]
    assert found.points[1].efficiency == 1.0
