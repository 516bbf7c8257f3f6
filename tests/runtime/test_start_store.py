"""Ranks of one start agree on a name in a store that earlier starts have written into."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from meshwright.errors import InputError
from meshwright.runtime.start_store import CURRENT, store_of_this_start


def start(shared: dist.HashStore, world: int, value: str) -> list[str]:
    """What every rank reads of a key that rank 0 sets after joining; ranks come in any order."""
    found: dict[int, str] = {}

    def rank_body(rank: int) -> None:
        store = store_of_this_start(shared, rank, world, limit_s=20.0)
        if rank == 0:
            store.set("key", value)
        found[rank] = store.get("key").decode()

    threads = [threading.Thread(target=rank_body, args=(rank,)) for rank in reversed(range(world))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(world)]


@pytest.mark.parametrize("worlds", [(4, 2, 4), (2, 2, 3), (1, 2)])
def test_every_start_sees_its_own_keys_whatever_started_before(worlds: tuple[int, ...]):
    shared = dist.HashStore()
    for number, world in enumerate(worlds):
        assert start(shared, world, f"of start {number}") == [f"of start {number}"] * world


def test_a_start_that_broke_off_is_left_behind():
    shared = dist.HashStore()
    with pytest.raises(InputError, match="rank 1, 2 did not come"):
        store_of_this_start(shared, 0, 3, limit_s=0.2)
    assert shared.get(CURRENT)
    assert start(shared, 3, "again") == ["again"] * 3
