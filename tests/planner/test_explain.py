"""Reasons, bounds, changes and shortfalls: every figure in a sentence is one that the cost model says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.planner.toys import cluster

from meshwright.cost.estimate import Estimate
from meshwright.cost.evaluate import estimate
from meshwright.cost.stack import default_stack
from meshwright.cost.workload import Workload
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import HybridParallelConfig, Recompute
from meshwright.models import load
from meshwright.models.spec import ModelSpec
from meshwright.planner.changes import changes
from meshwright.planner.constraints import Constraints
from meshwright.planner.explain import bound_of, why_not
from meshwright.planner.objectives import Objective
from meshwright.planner.search import search
from meshwright.planner.shortfall import shortfall
from meshwright.planner.sizing import fewest_gpus, smallest

MODEL = load("llama-3.1-70b")
WORK = Workload(seq=4096)
BASE = HybridParallelConfig(dp=2, tp=8, pp=4, sequence_parallel=True, global_batch=64, zero=1)


def priced(config: HybridParallelConfig, model: ModelSpec = MODEL, machine: Cluster | None = None) -> Estimate:
    return estimate(model, machine or cluster(config.world_size), WORK, config)


def test_a_slower_plan_is_blamed_on_the_part_that_grew_most() -> None:
    winner, loser = priced(BASE), priced(replace(BASE, recompute=Recompute.FULL))
    reason = why_not(winner, loser, MODEL, cluster(64))
    assert reason.part == "recompute"
    assert reason.slower == pytest.approx(loser.time.step_s / winner.time.step_s - 1)
    assert reason.difference == pytest.approx(loser.time.parts_s["recompute"])
    assert "every layer" in reason.sentence


def test_tensor_parallel_over_the_network_is_named() -> None:
    wide = replace(BASE, tp=16, dp=1)
    reason = why_not(priced(BASE), priced(wide), MODEL, cluster(64))
    assert "exposed tensor-parallel communication because tp=16 leaves the fast domain of 8" in reason.sentence


def test_tensor_parallel_over_the_network_is_the_first_reason_where_the_host_is_fast() -> None:
    stack = replace(default_stack(), layer_host_s=1e-6, tp_host_s=1e-7, microbatch_host_s=1e-6)
    winner, loser = (estimate(MODEL, cluster(64), WORK, config, stack) for config in (BASE, replace(BASE, tp=16, dp=1)))
    reason = why_not(winner, loser, MODEL, cluster(64))
    assert reason.part == "tp"
    assert reason.difference == pytest.approx(loser.time.parts_s["tp"] - winner.time.parts_s["tp"])


def test_a_part_that_hardly_weighs_is_not_named_beside_the_first() -> None:
    winner, loser = priced(BASE), priced(replace(BASE, recompute=Recompute.FULL))
    assert ";" not in why_not(winner, loser, MODEL, cluster(64)).sentence


def test_memory_objective_names_the_kind_that_grew_most() -> None:
    reason = why_not(priced(BASE), priced(replace(BASE, zero=0)), MODEL, cluster(64), Objective.MEMORY)
    assert reason.part == "optimizer"
    assert reason.more_memory_bytes > 0
    assert "GiB more" in reason.sentence


def test_the_bound_names_the_largest_loss() -> None:
    starved = priced(replace(BASE, global_batch=2, dp=2))
    bound = bound_of(starved, MODEL, cluster(64))
    assert bound.part == "bubble"
    assert bound.share == pytest.approx(starved.time.parts_s["bubble"] / starved.time.step_s)
    assert "pp=4" in bound.sentence


def test_every_change_is_a_search_that_can_be_repeated() -> None:
    machine = cluster(32)
    fixed = Constraints(recompute=(Recompute.NONE,))
    winner = search(MODEL, machine, WORK, 64, top=1, constraints=fixed).best[0]
    found = changes(MODEL, machine, WORK, winner, fixed, default_stack())
    assert len({c.name for c in found}) == len(found) >= 5
    assert [c.gain for c in found] == sorted((c.gain for c in found), reverse=True)
    faster = next(c for c in found if "network" in c.name)
    wide = replace(machine, inter=replace(machine.inter, bandwidth=2 * machine.inter.bandwidth))
    again = estimate(MODEL, wide, WORK, faster.config)
    assert faster.gain == pytest.approx(winner.time.step_s / again.time.step_s, rel=1e-6)
    assert faster.gain >= 1 - 1e-9
    for change in found:
        assert change.config.recompute is Recompute.NONE, "what the user fixed stays fixed"


def test_the_nearest_miss_and_every_remedy_are_checked_with_the_memory_model() -> None:
    machine = cluster(8)
    assert search(MODEL, machine, WORK, 16).best == ()
    missing = shortfall(MODEL, machine, WORK, 16, Constraints(), default_stack())
    assert missing.nearest is not None
    assert missing.nearest.missing_bytes > 0
    nearest = estimate(MODEL, machine, WORK, missing.nearest.config)
    assert nearest.memory.peak.total_bytes == pytest.approx(missing.nearest.memory_bytes, rel=1e-9)
    more = [r for r in missing.remedies if r.gpus > 8]
    assert more, "more GPUs would do"
    assert estimate(MODEL, cluster(more[0].gpus), WORK, more[0].config).memory.fits
    assert f"{more[0].gpus} GPUs" in more[0].sentence


def test_a_fixed_knob_that_stands_in_the_way_is_named() -> None:
    machine = cluster(32)
    fixed = Constraints(zero=(0,), pp=(1,), tp=(1, 2, 4, 8))
    assert search(MODEL, machine, WORK, 64, constraints=fixed).best == ()
    missing = shortfall(MODEL, machine, WORK, 64, fixed, default_stack())
    assert any("zero" in r.sentence or "pp" in r.sentence or "tp" in r.sentence for r in missing.remedies)
    for remedy in missing.remedies:
        if remedy.gpus == 32 and remedy.sentence.startswith("let the search"):
            assert estimate(MODEL, machine, WORK, remedy.config).memory.fits


def test_one_node_fewer_than_the_fewest_gpus_does_not_fit() -> None:
    model, work = load("llama-3.1-8b"), Workload(seq=4096)
    least = fewest_gpus(model, cluster(8), work, 64, Constraints(), default_stack())
    assert least is not None
    gpus = least.config.world_size
    assert least.fits
    assert gpus < 8
    below = smallest(model, cluster(gpus // 2), work, 64, Constraints(), default_stack())
    assert below is None or not below.fits
