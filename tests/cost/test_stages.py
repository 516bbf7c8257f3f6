"""Stage roles against placing every layer by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cost.shapes import decoder

from meshwright.cost.candidates import Candidates
from meshwright.cost.stages import stage_layers, stages
from meshwright.layout.config import HybridParallelConfig, Schedule
from meshwright.layout.split import even_split
from meshwright.schedules.closed_form import live_microbatches
from meshwright.schedules.placement import chunk_owner


def by_hand(
    pattern: tuple[int, ...], kinds: int, config: HybridParallelConfig
) -> list[tuple[tuple[int, ...], bool, bool]]:
    """(layers of each kind, holds the embedding, the head, sends, receives) of every stage, layer by layer."""
    v_shaped = config.schedule in (Schedule.ZBV, Schedule.DUALPIPEV)
    split = config.layer_split or even_split(len(pattern), config.pp * config.vpp)
    counts = [[0] * kinds for _ in range(config.pp)]
    layer = 0
    for chunk, size in enumerate(split):
        owner = chunk_owner(chunk, config.pp, config.vpp, v_shaped)
        for _ in range(size):
            counts[owner][pattern[layer]] += 1
            layer += 1
    owners = [chunk_owner(c, config.pp, config.vpp, v_shaped) for c in range(config.pp * config.vpp)]
    crossings = [(a, b) for a, b in pairwise(owners) if a != b]
    sends, receives = ([pair[end] for pair in crossings] for end in (0, 1))
    return [(tuple(counts[s]), s == 0, s == owners[-1], sends.count(s), receives.count(s)) for s in range(config.pp)]


@st.composite
def configs(draw: st.DrawFn) -> HybridParallelConfig:
    schedule = draw(st.sampled_from([Schedule.ONE_F_ONE_B, Schedule.INTERLEAVED, Schedule.ZBV]))
    pp = draw(st.integers(1 if schedule is Schedule.ONE_F_ONE_B else 2, 8))
    vpp = {Schedule.ONE_F_ONE_B: 1, Schedule.INTERLEAVED: draw(st.integers(2, 3)), Schedule.ZBV: 2}[schedule]
    return HybridParallelConfig(pp=pp, vpp=vpp, schedule=schedule, dp=1, global_batch=2 * pp)


@given(st.lists(configs(), min_size=1, max_size=6), st.integers(48, 70), st.integers(0, 48))
def test_roles_with_their_weights_are_the_stages_placed_by_hand(
    chosen: list[HybridParallelConfig], layers: int, moe_from: int
) -> None:
    model = decoder(layers=layers, moe_from=moe_from)
    candidates = Candidates.from_configs(chosen)
    roles = stages(model, candidates)
    assert np.array_equal(
        np.einsum("ns,nsk->nk", roles.weight, roles.layers), [model.layer_counts(0, layers)] * len(chosen)
    )
    for row, config in enumerate(chosen):
        expected = by_hand(model.pattern, len(model.kinds), config)
        found = []
        for s in range(roles.weight.shape[1]):
            content = (
                tuple(roles.layers[row, s].tolist()),
                bool(roles.first[row, s]),
                bool(roles.last[row, s]),
                int(roles.sends[row, s]),
                int(roles.receives[row, s]),
            )
            found += [content] * int(roles.weight[row, s])
            assert expected[roles.index[row, s]] == content
            held = [stage for stage, other in enumerate(expected) if other == content]
            stands = held[-1] if config.schedule is Schedule.ZBV else held[0]
            assert stands == roles.index[row, s], "a role stands at its stage with most live microbatches"
        assert sorted(found) == sorted(expected)


def test_a_layer_split_is_respected() -> None:
    model = decoder(layers=8)
    config = HybridParallelConfig(pp=4, layer_split=(1, 3, 3, 1), global_batch=4)
    roles = stages(model, Candidates.from_configs([config]))
    assert roles.layers[0, :, 0].tolist() == [1, 3, 1]
    assert roles.weight[0].tolist() == [1, 2, 1]


def test_v_shaped_schedules_put_embedding_and_head_on_stage_0() -> None:
    model = decoder(layers=8)
    config = HybridParallelConfig(pp=4, vpp=2, schedule=Schedule.DUALPIPEV, global_batch=8)
    roles = stages(model, Candidates.from_configs([config]))
    assert roles.first[0, 0]
    assert roles.last[0, 0]
    assert not roles.last[0, 1:].any()


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("microbatches", [1, 3, 5, 8, 16])
def test_no_stage_holds_more_live_microbatches_than_the_role_it_belongs_to(
    schedule: Schedule, microbatches: int
) -> None:
    vpp = 1 if schedule in (Schedule.GPIPE, Schedule.ONE_F_ONE_B, Schedule.ZB_H1) else 2
    config = HybridParallelConfig(pp=4, vpp=vpp, schedule=schedule, global_batch=microbatches)
    roles = stages(decoder(layers=8), Candidates.from_configs([config]))
    live = live_microbatches(tuple(Schedule).index(schedule), 4, microbatches, vpp, np.arange(4))
    assert live[roles.index[0]].max() == live.max()


def test_a_layer_split_that_misses_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="does not place 8 layers"):
        stage_layers(decoder(layers=8), 2, 1, False, (3, 4))


@given(st.integers(1, 200), st.integers(1, 64))
def test_an_even_split_differs_by_at_most_one_and_spares_the_ends(layers: int, chunks: int) -> None:
    split = even_split(layers, chunks)
    assert sum(split) == layers
    assert max(split) - min(split) <= 1
    assert split[-1] == min(split)
