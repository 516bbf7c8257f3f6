"""Where chunks live."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.schedules import chunk_owner, chunks_of_stage


def test_round_robin_and_v_place_chunks_as_drawn_in_the_papers() -> None:
    assert [chunk_owner(c, 3, 2, v_shaped=False) for c in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [chunk_owner(c, 3, 2, v_shaped=True) for c in range(6)] == [0, 1, 2, 2, 1, 0]


@given(st.integers(1, 16), st.integers(1, 6), st.booleans())
def test_chunks_of_the_stages_partition_the_model(pp: int, vpp: int, v_shaped: bool) -> None:
    held = [c for stage in range(pp) for c in chunks_of_stage(stage, pp, vpp, v_shaped)]
    assert sorted(held) == list(range(pp * vpp))
    assert all(len(chunks_of_stage(stage, pp, vpp, v_shaped)) == vpp for stage in range(pp))


def test_a_chunk_outside_the_model_has_no_owner() -> None:
    with pytest.raises(ValueError, match="chunk 6 is not one of the 6 chunks"):
        chunk_owner(6, 3, 2, v_shaped=False)
