"""The search: its winner is legal, fits, is the best there is, and beats the rule of thumb."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.planner.toys import cluster, dense, moe

from meshwright.cost.candidates import Chunk
from meshwright.cost.evaluate import estimate, evaluate
from meshwright.cost.memory_peak import peak_bytes
from meshwright.cost.stack import default_stack, stacks
from meshwright.cost.workload import Workload
from meshwright.errors import InputError
from meshwright.layout.config import Recompute, Schedule
from meshwright.models import load
from meshwright.models.spec import ModelSpec
from meshwright.planner.constraints import Constraints
from meshwright.planner.enumerate import space
from meshwright.planner.explore import explore
from meshwright.planner.front import Survivors, fronts, joined, mesh_ids
from meshwright.planner.legality import check
from meshwright.planner.objectives import MEMORY_SPEED_SHARE, Objective
from meshwright.planner.search import search
from meshwright.planner.sizing import smallest

TINY = {
    "dense": (dense(layers=4, heads=4), Constraints(zero=(0, 3), recompute_every=(1,), sequence_parallel=(True,))),
    "moe": (moe(layers=4), Constraints(schedule=(Schedule.ONE_F_ONE_B, Schedule.ZBV), zero=(1,), micro_batch=(1,))),
}


@pytest.mark.parametrize("kind", sorted(TINY))
@pytest.mark.parametrize("memory_gib", [79.0, 6.0])
def test_the_winner_is_the_best_of_estimating_every_configuration_alone(kind: str, memory_gib: float) -> None:
    model, fixed = TINY[kind]
    machine, work = cluster(4, memory_gib), Workload(seq=512)
    found = search(model, machine, work, 4, constraints=fixed, headroom=0.0)
    alone = [
        estimate(model, machine, work, chunk.config(row), default_stack())
        for _, chunk in space(model, machine, 512, 4, 4, fixed).chunks()
        for row in range(len(chunk))
    ]
    fitting = [e for e in alone if e.memory.fits]
    assert found.counts.enumerated == len(alone)
    assert found.counts.feasible <= len(fitting)
    best = min(e.time.step_s for e in fitting)
    assert found.best[0].time.step_s == pytest.approx(best, rel=1e-6)
    smallest = min(
        e.memory.peak.total_bytes for e in fitting if e.time.step_s <= best / MEMORY_SPEED_SHARE * (1 + 1e-9)
    )
    lean = search(model, machine, work, 4, Objective.MEMORY, constraints=fixed, headroom=0.0)
    assert lean.best[0].memory.peak.total_bytes == pytest.approx(smallest, rel=1e-6)


@settings(max_examples=12, deadline=None)
@given(
    model=st.sampled_from([dense(layers=6), moe(layers=4), load("qwen3-8b"), load("qwen3-30b-a3b")]),
    gpus=st.sampled_from([1, 4, 8, 16, 32]),
    batch=st.sampled_from([4, 16, 60]),
    seq=st.sampled_from([1024, 4096]),
    memory_gib=st.sampled_from([16.0, 79.0]),
    objective=st.sampled_from([Objective.THROUGHPUT, Objective.MEMORY]),
)
def test_winners_are_legal_fit_and_are_never_worse_than_the_rule_of_thumb(
    model: ModelSpec, gpus: int, batch: int, seq: int, memory_gib: float, objective: Objective
) -> None:
    machine, work = cluster(gpus, memory_gib), Workload(seq=seq)
    try:
        found = search(model, machine, work, batch, objective, top=3)
    except InputError:
        assert len(space(model, machine, seq, gpus, batch)) == 0
        return
    for plan in found.best:
        check(plan.config, model, machine, seq)
        assert plan.memory.fits
        assert plan.config.world_size == gpus
    if found.rule_of_thumb is not None:
        assert found.best, "the rule of thumb fits and the search found nothing"
        limit = 1.0 if objective is Objective.THROUGHPUT else 1 / MEMORY_SPEED_SHARE
        assert found.best[0].time.step_s <= found.rule_of_thumb.time.step_s * limit * (1 + 1e-9)
        assert found.gain is not None


def test_leaving_out_by_bound_changes_nothing_that_is_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    share = 0.95
    monkeypatch.setattr("meshwright.planner.explore.SLOWEST_SHARE", share)
    model, machine, work = load("llama-3.1-8b"), cluster(32), Workload(seq=2048)
    everything = space(model, machine, 2048, 32, 64)
    found = explore(model, machine, work, everything, default_stack(), chunk_rows=2000, headroom=0.0)
    survivors, counts = found.survivors, found.counts
    assert counts.evaluated < counts.enumerated, "nothing was left out: the test shows nothing"
    parts = []
    for _, chunk in everything.chunks():
        result = evaluate(model, machine, work, chunk, prune=True)
        parts.append(Survivors(chunk.take(result.fits), result.step_s[result.fits], result.memory_bytes[result.fits]))
    whole = joined(parts)
    whole = whole.take(whole.step_s <= whole.step_s.min() / share)
    whole = fronts(whole, mesh_ids(whole.candidates))
    assert np.array_equal(np.sort(whole.step_s), np.sort(survivors.step_s))
    assert np.array_equal(np.sort(whole.memory_bytes), np.sort(survivors.memory_bytes))


@pytest.mark.parametrize("name", ["llama-3.1-70b", "qwen3-235b-a22b"])
@pytest.mark.parametrize("framework", ["megatron-core", "torchtitan"])
def test_a_frame_whose_lean_states_do_not_fit_has_none_that_does(name: str, framework: str) -> None:
    model, machine, work, stack = load(name), cluster(64), Workload(seq=8192), stacks()[framework]
    found = space(model, machine, 8192, 64, 48)
    some = found.take(np.random.default_rng(2).permutation(len(found.counts))[:300])
    rows = np.repeat(np.arange(300), some.counts)
    least, leanest = np.full(300, np.inf), np.full(300, np.inf)
    memory = [peak_bytes(model, machine, work, Chunk.of(chunk), stack) for _, chunk in some.chunks()]
    np.minimum.at(least, rows, np.concatenate(memory))
    rows = np.repeat(np.arange(300), some.lean.counts)
    memory = [peak_bytes(model, machine, work, Chunk.of(chunk), stack) for _, chunk in some.lean.chunks()]
    np.minimum.at(leanest, rows, np.concatenate(memory))
    assert len(some.lean) < len(some) / 4
    assert np.array_equal(least, leanest)


def test_the_front_has_no_point_that_another_beats() -> None:
    found = search(dense(layers=8), cluster(16), Workload(seq=2048), 32)
    assert len(found.pareto) > 1
    steps = [p.step_s for p in found.pareto]
    memory = [p.memory_bytes for p in found.pareto]
    assert steps == sorted(steps)
    assert memory == sorted(memory, reverse=True)
    assert found.pareto[0].step_s == pytest.approx(found.best[0].time.step_s, rel=1e-6)


def test_two_runs_and_two_chunk_sizes_give_the_same_ranking() -> None:
    model, machine, work = moe(layers=4), cluster(8), Workload(seq=2048)
    first = search(model, machine, work, 16)
    again = search(model, machine, work, 16)
    assert [e.config for e in first.best] == [e.config for e in again.best]
    everything = space(model, machine, 2048, 16 // 2, 16)
    small = explore(model, machine, work, everything, default_stack(), chunk_rows=500).survivors
    large = explore(model, machine, work, everything, default_stack()).survivors
    assert np.array_equal(np.sort(small.step_s), np.sort(large.step_s))


def test_plans_differ_in_their_mesh_and_come_in_order() -> None:
    found = search(dense(layers=8), cluster(16), Workload(seq=2048), 32, top=3)
    meshes = [(c.tp, c.pp, c.cp, c.dp, c.ep, c.expert_tp) for c in (e.config for e in found.best)]
    assert len(set(meshes)) == len(meshes) == 3
    steps = [e.time.step_s for e in found.best]
    assert steps == sorted(steps)


def test_fixed_axes_hold_in_every_plan() -> None:
    fixed = Constraints(tp=(4,), zero=(0, 1), recompute=(Recompute.NONE,), schedule=(Schedule.ONE_F_ONE_B,))
    found = search(dense(layers=8), cluster(16), Workload(seq=2048), 32, constraints=fixed)
    assert found.best
    for plan in (e.config for e in found.best):
        assert plan.tp == 4
        assert plan.zero <= 1
        assert plan.recompute is Recompute.NONE
        assert plan.schedule is Schedule.ONE_F_ONE_B


def test_of_equal_plans_the_simplest_is_named() -> None:
    found = search(dense(layers=4), cluster(1), Workload(seq=512), 4, constraints=Constraints(micro_batch=(4,)))
    assert found.best[0].config.recompute is Recompute.NONE
    assert found.best[0].config.zero == 0


def test_nothing_fits_gives_no_plans_instead_of_an_error() -> None:
    found = search(load("llama-3.1-70b"), cluster(8), Workload(seq=4096), 16)
    assert found.best == ()
    assert found.pareto == ()
    assert found.gain is None
    assert found.counts.feasible == 0


@pytest.mark.parametrize(
    ("fixed", "batch", "words"),
    [
        (Constraints(tp=(3,)), 16, "tp=3 does not divide 8 attention heads"),
        (Constraints(pp=(64,)), 16, "layers"),
        (Constraints(tp=(4,), pp=(4,)), 16, "does not divide 8 GPUs"),
        (Constraints(micro_batch=(5,)), 16, "global batch 16 is not a multiple"),
        (Constraints(vpp=(3,), pp=(4,), schedule=(Schedule.INTERLEAVED,)), 16, "vpp"),
        (Constraints(ep=(2,)), 16, "no experts"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_what_cannot_be_is_one_line_in_the_users_words(fixed: Constraints, batch: int, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        search(dense(layers=8), cluster(8), Workload(seq=1024), batch, constraints=fixed)
    assert "\n" not in str(caught.value)


def test_progress_is_reported_once_a_search_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshwright.planner.explore.PROGRESS_AFTER_S", 0.0)
    seen: list[tuple[int, int]] = []
    search(
        dense(layers=8), cluster(16), Workload(seq=2048), 32, progress=lambda done, total: seen.append((done, total))
    )
    assert seen
    assert all(0 < done <= total for done, total in seen)


def test_faster_machines_are_never_planned_slower() -> None:
    model, machine, work = dense(layers=8, hidden=4096, heads=32), cluster(16), Workload(seq=2048)
    slow = search(model, machine, work, 32, top=1).best[0].time.step_s
    wide = replace(machine, inter=replace(machine.inter, bandwidth=2 * machine.inter.bandwidth))
    roomy = cluster(16, 200.0)
    assert search(model, wide, work, 32, top=1).best[0].time.step_s <= slow * (1 + 1e-9)
    assert search(model, roomy, work, 32, top=1).best[0].time.step_s <= slow * (1 + 1e-9)


def test_plans_leave_headroom_where_any_can_and_say_so_where_none_does() -> None:
    model, work = load("llama-3.1-8b"), Workload(seq=4096)
    roomy = search(model, cluster(8), work, 16)
    assert all(p.memory.peak.total_bytes <= 0.95 * p.memory.capacity_bytes for p in roomy.best)
    least = smallest(model, cluster(8), work, 16, Constraints(), default_stack())
    assert least is not None
    brim = search(model, cluster(8, least.memory_bytes * 1.02 / 2**30), work, 16)
    assert brim.best
    assert any("of the memory free" in note for note in brim.notes)


def test_objective_memory_also_names_the_fewest_gpus() -> None:
    found = search(load("llama-3.1-8b"), cluster(16), Workload(seq=4096), 32, Objective.MEMORY, top=1)
    assert found.fewest is not None
    assert found.fewest.fits
    assert found.fewest.config.world_size < 16
    assert any("fewest GPUs" in note for note in found.notes)
