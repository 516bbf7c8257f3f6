"""Which ranks or hosts are slower than their peers, and whether that is more than chance.

In: per step what every rank computed, and who does the same work (its peers). Out: `Straggler`s. Test: a rank that is
no slower than its p - 1 peers is the slowest of them in a step with probability 1/p, so the number of steps in which it
is the slowest is at most binomial; its tail is the p-value, multiplied by the number of ranks tested (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]

SIGNIFICANT = 0.01
LEAST_EXCESS = 0.05
"""Share by which a rank must be slower than its peers' median to matter."""


@dataclass(frozen=True)
class Straggler:
    """`excess_s`: computing time per step beyond the median of the peers (both medians over steps). `kind` is 'rank'
    or 'host'; `slowest_in` of `steps` steps it was the slowest of `peers` that do the same work."""

    kind: str
    ranks: tuple[int, ...]
    host: str
    excess_s: float
    ratio: float
    slowest_in: int
    steps: int
    peers: int
    p_value: float


def stragglers(
    compute_s: Seconds, peers: Sequence[Sequence[int]], hosts: Mapping[int, str], ranks: Sequence[int]
) -> tuple[Straggler, ...]:
    """`compute_s` [steps, ranks]; `peers` are groups of columns that do the same work; `ranks` names the columns.

    A host takes its ranks' place where more than one of them straggles and none of its ranks does not.
    """
    found: list[Straggler] = []
    tested = sum(len(group) for group in peers if len(group) > 1)
    for group in peers:
        if len(group) > 1:
            found += _within(compute_s[:, list(group)], [ranks[i] for i in group], hosts, tested)
    return tuple(sorted(_by_host(found, hosts, ranks), key=lambda s: -s.excess_s))


def _within(compute_s: Seconds, ranks: Sequence[int], hosts: Mapping[int, str], tested: int) -> list[Straggler]:
    steps, p = compute_s.shape
    slowest = np.bincount(compute_s.argmax(axis=1), minlength=p)
    middle = np.median(compute_s, axis=0)
    found: list[Straggler] = []
    for column in range(p):
        others = float(np.median(np.delete(middle, column)))
        excess = float(middle[column]) - others
        chance = min(1.0, tested * binomial_tail(int(slowest[column]), steps, 1.0 / p))
        if others > 0 and excess > LEAST_EXCESS * others and chance < SIGNIFICANT:
            found.append(
                Straggler(
                    "rank",
                    (ranks[column],),
                    hosts.get(ranks[column], "?"),
                    excess,
                    float(middle[column]) / others,
                    int(slowest[column]),
                    steps,
                    p,
                    chance,
                )
            )
    return found


def _by_host(found: Sequence[Straggler], hosts: Mapping[int, str], ranks: Sequence[int]) -> list[Straggler]:
    merged: list[Straggler] = []
    for host in dict.fromkeys(s.host for s in found):
        own = [s for s in found if s.host == host]
        there = [r for r in ranks if hosts.get(r) == host]
        if len(own) > 1 and len(own) == len(there) and len(there) < len(ranks):
            worst = max(own, key=lambda s: s.excess_s)
            merged.append(
                Straggler(
                    "host", tuple(sorted(r for s in own for r in s.ranks)), host, worst.excess_s, worst.ratio,
                    min(s.slowest_in for s in own), worst.steps, worst.peers, max(s.p_value for s in own),
                )
            )  # fmt: skip
        else:
            merged += own
    return merged


def binomial_tail(successes: int, trials: int, chance: float) -> float:
    """P(at least `successes` of `trials`)."""
    if successes <= 0:
        return 1.0
    if chance >= 1.0:
        return 1.0
    logs = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(chance) + (trials - k) * math.log1p(-chance)
        for k in range(successes, trials + 1)
    ]  # fmt: skip
    top = max(logs)
    return min(1.0, math.exp(top) * sum(math.exp(v - top) for v in logs))
