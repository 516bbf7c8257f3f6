"""The significance test of stragglers: finds planted ones, is silent on noise, and its tail is the binomial's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from meshwright.doctor.stragglers import binomial_tail, stragglers

PEERS = [[0, 1, 2, 3], [4, 5, 6, 7]]
HOSTS = {rank: "ab"[rank % 4 // 2] for rank in range(8)}


def times(steps: int = 40, seed: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return 1.0 + 0.05 * np.random.default_rng(seed).standard_normal((steps, 8))


@pytest.mark.parametrize("rank", range(8))
def test_a_rank_that_is_slower_than_its_peers_is_named(rank: int):
    measured = times()
    measured[:, rank] *= 1.3
    (found,) = stragglers(measured, PEERS, HOSTS, list(range(8)))
    assert found.ranks == (rank,)
    assert found.excess_s == pytest.approx(0.3, abs=0.05)
    assert found.p_value < 1e-10


def test_noise_names_nobody():
    assert all(not stragglers(times(seed=seed), PEERS, HOSTS, list(range(8))) for seed in range(200))


def test_a_stage_that_computes_more_is_no_straggler():
    measured = times()
    measured[:, 4:] *= 2.0
    assert stragglers(measured, PEERS, HOSTS, list(range(8))) == ()


def test_one_slow_step_is_no_straggler():
    measured = times()
    measured[7, 2] = 60.0
    assert stragglers(measured, PEERS, HOSTS, list(range(8))) == ()


@pytest.mark.parametrize("successes", range(13))
def test_the_tail_is_the_binomials(successes: int):
    exact = sum(math.comb(12, k) * 0.25**k * 0.75 ** (12 - k) for k in range(successes, 13))
    assert binomial_tail(successes, 12, 0.25) == pytest.approx(exact, rel=1e-9)
