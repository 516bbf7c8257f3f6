"""Ranks start, talk, return in order, and fail loudly, quickly and without leaving anything behind."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from meshwright.runtime.launch import RankFailedError, run_ranks


def summed(offset: int) -> tuple[int, int, float]:
    value = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(value)
    return dist.get_rank(), os.getpid(), float(value)


def test_every_rank_runs_the_body_and_results_come_back_in_rank_order():
    results = run_ranks(4, summed, 10)
    assert [rank for rank, _, _ in results] == [0, 1, 2, 3]
    assert {value for _, _, value in results} == {46.0}
    assert len({pid for _, pid, _ in results}) == 4


def fail_on_one(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("spoiled weights")
    dist.barrier()


def test_the_first_failing_rank_is_named_with_its_traceback_while_others_wait_for_it():
    started = time.monotonic()
    with pytest.raises(RankFailedError, match="spoiled weights") as caught:
        run_ranks(3, fail_on_one, 1, timeout_s=60)
    assert caught.value.rank == 1
    assert time.monotonic() - started < 20


def lose_a_peer_before_it_counts_as_ended() -> None:
    if dist.get_rank() == 1:
        raise ConnectionError("rank 0 is gone")
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_rank_is_the_cause_even_where_its_peer_reports_first():
    with pytest.raises(RankFailedError, match="killed by SIGKILL") as caught:
        run_ranks(2, lose_a_peer_before_it_counts_as_ended, timeout_s=60)
    assert caught.value.rank == 0


def die_silently() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def test_a_rank_that_dies_without_a_word_is_reported_with_its_exit_code():
    with pytest.raises(RankFailedError) as caught:
        run_ranks(2, die_silently, timeout_s=60)
    assert caught.value.rank in (0, 1)  # rank 0 may first report the connection that rank 1 broke


def hang() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def test_a_rank_that_hangs_is_killed_at_the_time_limit():
    started = time.monotonic()
    with pytest.raises(RankFailedError, match="did not end within"):
        run_ranks(2, hang, timeout_s=3)
    assert time.monotonic() - started < 15
