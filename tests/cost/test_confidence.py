"""What an estimate rests on: inputs named by where they come from, ranges wider where less is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.planner.toys import cluster

from meshwright.cost.confidence import Input, Source
from meshwright.cost.estimate import Estimate
from meshwright.cost.evaluate import estimate
from meshwright.cost.fitted import evidence, fitted_values
from meshwright.cost.stack import stacks
from meshwright.cost.workload import Workload
from meshwright.hardware.load import load as cluster_named
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import HybridParallelConfig
from meshwright.models import load

DENSE = HybridParallelConfig(dp=2, tp=4, sequence_parallel=True, global_batch=16, zero=1)
ONE = HybridParallelConfig(global_batch=4)


def priced(config: HybridParallelConfig, machine: Cluster, stack: str = "megatron-core") -> Estimate:
    return estimate(load("llama-3.1-8b"), machine, Workload(4096), config, stacks()[stack])


def named(found: Estimate) -> dict[str, Input]:
    return {one.name: one for one in found.confidence.inputs}


def test_a_constant_with_rows_behind_it_is_measured_and_says_which() -> None:
    products = named(priced(DENSE, cluster_named("h100-sxm")))["matrix products"]
    assert products.source is Source.MEASURED
    assert evidence("device", "hopper")["gemm"] in products.evidence


def test_a_variant_interpolates_what_its_main_release_was_fitted_for() -> None:
    assert "elementwise_passes" not in fitted_values("stack", "nemo")
    assert named(priced(DENSE, cluster_named("h100-sxm"), "nemo"))["element-wise work"].source is Source.INTERPOLATED


def test_an_architecture_without_rows_is_assumed_and_has_the_wider_range() -> None:
    known = cluster_named("h100-sxm")
    unknown = replace(known, accelerator=replace(known.accelerator, architecture="ada"))
    sure, unsure = priced(DENSE, known), priced(DENSE, unknown)
    assert sure.confidence.source is Source.MEASURED
    assert unsure.confidence.source is Source.ASSUMED

    def width(found: Estimate) -> float:
        low, high = found.confidence.step_s
        assert low < found.time.step_s < high
        return (high - low) / found.time.step_s

    assert width(unsure) > width(sure)


def test_the_memory_range_holds_the_estimate() -> None:
    found = priced(DENSE, cluster_named("h100-sxm"))
    low, high = found.confidence.memory_bytes
    assert low < found.memory.peak.total_bytes < high


@pytest.mark.parametrize("name", ["overlap of tp", "overlap of dp", "fast links", "slow ranks at scale"])
def test_only_what_the_split_uses_is_named(name: str) -> None:
    machine = cluster(8)
    assert name in named(priced(DENSE, machine))
    assert name not in named(priced(ONE, replace(machine, nodes=1)))
