"""Links of forked ranks: every axis, collective and size is measured; pairs meet once."""

from __future__ import annotations

from itertools import combinations

import pytest

from meshwright.layout.config import HybridParallelConfig
from meshwright.runtime.link_probe import COLLECTIVES, measure_links_forked, rounds


def test_every_collective_of_every_axis_and_size_is_measured_and_pairs_too():
    found = measure_links_forked(HybridParallelConfig(dp=2, tp=2), pairs=True, sizes=(4, 4096))
    groups = {(s.axis, s.ranks) for s in found.samples}
    assert groups == {
        *(("tp", pair) for pair in ((0, 1), (2, 3))),
        *(("dp", pair) for pair in ((0, 2), (1, 3))),
        *(("pair", pair) for pair in combinations(range(4), 2)),
    }
    of_tp = {(s.collective, s.call_bytes) for s in found.samples if s.axis == "tp"}
    assert of_tp == {(c.value, size) for c in COLLECTIVES for size in (4, 4096)}
    assert all(0 < s.seconds < 60 for s in found.samples)
    assert len(found.hosts) == 4


@pytest.mark.parametrize("world", [2, 3, 8, 17, 24])
def test_rounds_pair_every_two_ranks_once_and_no_rank_twice_in_a_round(world: int):
    made = rounds(world)
    assert sorted(pair for one in made for pair in one) == list(combinations(range(world), 2))
    assert all(len({rank for pair in one for rank in pair}) == 2 * len(one) for one in made)
