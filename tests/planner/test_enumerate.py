"""The space of configurations: complete, legal, without duplicates, within what the user fixed."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.planner.toys import cluster, dense, moe

from meshwright.cost.candidates import Candidates
from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig, Recompute, Schedule
from meshwright.layout.validate import violations
from meshwright.models.spec import ModelSpec
from meshwright.planner.constraints import Constraints
from meshwright.planner.enumerate import MIN_TOKENS_PER_CP_RANK, RECOMPUTE_STRIDES, Space, space
from meshwright.planner.legality import cluster_facts, legal, model_facts
from meshwright.planner.table import divisors


def configs(found: Space) -> list[HybridParallelConfig]:
    return [chunk.config(row) for _, chunk in found.chunks() for row in range(len(chunk))]


def one_by_one(model: ModelSpec, gpus: int, seq: int, batch: int) -> set[HybridParallelConfig]:
    """All sizes tried in nested loops and kept where no rule of layout is broken."""
    facts, machine = model_facts(model, seq), cluster_facts(cluster(gpus))
    sizes = divisors(gpus)
    saves = [(Recompute.NONE, 1), (Recompute.SELECTIVE, 1), *((Recompute.FULL, n) for n in RECOMPUTE_STRIDES)]
    found: set[HybridParallelConfig] = set()
    for tp, pp, dp, ep in product(sizes, repeat=4):
        if tp * pp * dp != gpus:
            continue
        depth = -(-model.num_layers // pp)
        expert_sizes = {1, tp} if any(k.mlp and hasattr(k.mlp, "experts") for k in model.kinds) else {1}
        for etp, vpp, sp, micro in product(expert_sizes, (1, 2, 3, 4), (False, True), range(1, batch + 1)):
            for schedule, zero, (mode, every) in product(Schedule, range(4), saves):
                same_as_1f1b = pp == 1 and schedule is not Schedule.ONE_F_ONE_B
                if same_as_1f1b or (dp == 1 and zero) or (tp == 1 and sp) or every > depth:
                    continue
                knobs = {"schedule": schedule, "zero": zero, "recompute": mode, "recompute_every": every}
                sizes_of = {"dp": dp, "tp": tp, "pp": pp, "ep": ep, "expert_tp": etp, "vpp": vpp, "micro_batch": micro}
                with suppress(InputError):
                    found.add(HybridParallelConfig(**sizes_of, **knobs, sequence_parallel=sp, global_batch=batch))
    return {c for c in found if not violations(c, facts, machine)}


@pytest.mark.parametrize(("model", "gpus"), [(dense(layers=4, heads=4), 4), (moe(layers=4), 4)], ids=["dense", "moe"])
def test_the_space_is_what_nested_loops_find(model: ModelSpec, gpus: int) -> None:
    found = configs(space(model, cluster(gpus), 512, gpus, 4))
    assert len(found) == len(set(found)), "a configuration is listed twice"
    assert set(found) == one_by_one(model, gpus, 512, 4)


@settings(max_examples=40, deadline=None)
@given(
    gpus=st.sampled_from([1, 2, 3, 6, 8, 12, 16, 24, 40, 64]),
    layers=st.integers(1, 13),
    heads=st.sampled_from([1, 4, 6, 12]),
    batch=st.sampled_from([1, 6, 16, 30]),
    seq=st.sampled_from([1000, 2048, 8192]),
    experts=st.sampled_from([0, 6, 8]),
)
def test_every_configuration_is_legal_and_uses_all_gpus(
    gpus: int, layers: int, heads: int, batch: int, seq: int, experts: int
) -> None:
    model = moe(layers, experts) if experts else dense(layers, heads, 96 * heads)
    machine = cluster(gpus) if gpus <= 8 else replace(cluster(8), nodes=gpus // 8) if gpus % 8 == 0 else None
    if machine is None:
        machine = replace(cluster(4), nodes=gpus // 4)
    total = 0
    for _, chunk in (found := space(model, machine, seq, gpus, batch)).chunks(5000):
        total += len(chunk)
        assert legal(model, machine, seq, chunk).all()
        assert (chunk.world == gpus).all()
        assert (chunk.microbatches * chunk.micro_batch * chunk.dp == batch).all()
    assert total == len(found)


def test_chunks_follow_one_another_whatever_their_size() -> None:
    found = space(dense(), cluster(16), 2048, 16, 8)
    whole = configs(found)
    pieces = [chunk.config(row) for _, chunk in found.chunks(97) for row in range(len(chunk))]
    assert pieces == whole
    assert len(whole) == len(found)


@pytest.mark.parametrize(
    "fixed",
    [
        Constraints(tp=(2,)),
        Constraints(pp=(2, 4), schedule=(Schedule.ZB_H1,)),
        Constraints(zero=(3,), zero_shards=(4,)),
        Constraints(recompute=(Recompute.FULL,), recompute_every=(3,)),
        Constraints(micro_batch=(2,), sequence_parallel=(False,)),
        Constraints(dp=(4,), cp=(2,)),
        Constraints(schedule=(Schedule.INTERLEAVED,), vpp=(3,)),
    ],
    ids=str,
)
def test_what_the_user_fixed_holds_in_every_row(fixed: Constraints) -> None:
    found = configs(space(dense(layers=12), cluster(16), 4096, 16, 16, fixed))
    assert found
    for config in found:
        for name, allowed in fixed.fixed.items():
            value = getattr(config, name)
            if name == "zero_shards":
                value = value or config.dp * config.cp
            if name == "recompute_every" and config.recompute is not Recompute.FULL:
                continue
            assert value in allowed, f"{name}={value}"


def test_context_parallel_is_left_out_by_tokens_and_said_so() -> None:
    short = space(dense(), cluster(16), MIN_TOKENS_PER_CP_RANK, 16, 16)
    assert {c.cp for c in configs(short)} == {1}
    assert any("context parallel" in note for note in short.notes)
    long = space(dense(), cluster(16), 4 * MIN_TOKENS_PER_CP_RANK, 16, 16)
    assert {c.cp for c in configs(long)} == {1, 2, 4}
    named = space(dense(), cluster(16), MIN_TOKENS_PER_CP_RANK, 16, 16, Constraints(cp=(8,)))
    assert {c.cp for c in configs(named)} == {8}


def test_a_single_sequence_is_spread_by_context_parallel() -> None:
    found = configs(space(dense(), cluster(8), 65536, 8, 1))
    assert all(c.dp == 1 for c in found)
    assert 8 in {c.cp for c in found}


def test_short_pieces_of_a_sequence_are_the_last_resort() -> None:
    found = space(dense(layers=1, heads=1, hidden=64), cluster(8), 1024, 8, 2)
    assert {c.cp for c in configs(found)} == {4, 8}, "one head, one layer, two sequences: only cp is left"
    assert found.notes


def test_sizes_that_are_no_powers_of_two_are_found() -> None:
    machine = replace(cluster(6), nodes=1)
    found = configs(space(dense(layers=7, heads=6, hidden=768), machine, 2048, 6, 12))
    assert {c.tp for c in found} == {1, 3, 6}, "tp=2 does not divide three key-value heads"
    assert {c.pp for c in found} == {1, 2, 3, 6}
    assert {c.micro_batch for c in found} >= {1, 2, 3, 4, 6, 12}


def test_no_legal_configuration_gives_an_empty_space() -> None:
    found = space(dense(layers=1, heads=1, hidden=64), cluster(8), 999, 8, 3)
    assert len(found) == 0
    assert list(found.chunks()) == []


@pytest.mark.parametrize(
    "wrong", [{"tp": (0,)}, {"pp": (-1,)}, {"zero": (4,)}, {"tp": (True,)}, {"cp": ()}, {"ep": (10**12,)}]
)
def test_sizes_that_cannot_be_are_refused(wrong: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(InputError):
        Constraints(**wrong)


def test_rows_of_a_large_space_are_made_without_a_loop_over_them() -> None:
    from meshwright.models import load

    found = space(load("gpt3-175b"), replace(cluster(8), nodes=512), 2048, 4096, 1536)
    assert len(found) > 50_000
    kinds = [type(chunk) for _, chunk in found.chunks()]
    assert set(kinds) == {Candidates}
    assert np.all([len(chunk) > 10_000 for _, chunk in list(found.chunks())[:-1]])


@pytest.mark.parametrize(("seq", "batch"), [(0, 8), (2048, 0), (-1, 8), (2048, -8)])
def test_batches_and_sequences_below_one_are_refused(seq: int, batch: int) -> None:
    with pytest.raises(InputError, match="whole number from 1"):
        space(dense(), cluster(8), seq, 8, batch)


def test_only_schedules_that_the_software_has_are_searched_unless_one_is_named() -> None:
    def schedules(fixed: Constraints) -> set[Schedule]:
        return {config.schedule for config in configs(space(dense(), cluster(4), 64, 4, 8, fixed))}

    runs = (Schedule.ONE_F_ONE_B, Schedule.INTERLEAVED)
    assert schedules(Constraints()) == set(Schedule)
    assert schedules(Constraints(runs=runs)) == set(runs)
    assert schedules(Constraints(runs=runs, schedule=(Schedule.ZB_H1,), pp=(2,))) == {Schedule.ZB_H1}
