"""Ranks that take longer than others for their own work, from the last steps of all logs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from meshwright.doctor.hang.evidence import Evidence

LEAST_STEPS = 3
CLEARLY = 1.3
"""A rank is slow where its own time is this much above the median of its stage's other ranks."""


@dataclass(frozen=True)
class SlowRank:
    """`slowest_in` of the last `steps` steps; `ratio`: its own time to the median of ranks of the same stage."""

    rank: int
    slowest_in: int
    steps: int
    ratio: float


def slow_rank(evidence: Evidence) -> SlowRank | None:
    """The rank that is slowest in most of the steps that all logs hold, where it is clearly so."""
    tables = {log.identity.rank: log.steps for log in evidence.logs}
    counts = Counter(int(step) for table in tables.values() for step in table["step"].tolist())
    steps, ranks = sorted(step for step, count in counts.items() if count == len(tables)), sorted(tables)
    if len(steps) < LEAST_STEPS or len(ranks) < 2:
        return None
    own = np.empty((len(ranks), len(steps)))
    for i, rank in enumerate(ranks):
        table = tables[rank][np.isin(tables[rank]["step"], steps)]
        lasted = (table["ended_ns"] - table["started_ns"]).astype(float)
        own[i] = np.maximum(lasted - table["waited_ns"].astype(float), 0.0)
    stage = np.asarray([evidence.log_of[r].identity.coordinates.get("pp", 0) for r in ranks])
    alike = (stage[:, None] == stage[None, :]) & ~np.eye(len(ranks), dtype=bool)
    alike[~alike.any(axis=1)] = True  # alone on its stage: compared with all
    peers = np.stack([np.median(own[others], axis=0) for others in alike])
    ratio = own / np.maximum(peers, 1.0)
    slowest = ratio.argmax(axis=0)
    winner = int(np.bincount(slowest, minlength=len(ranks)).argmax())
    typical = float(np.median(ratio[winner]))
    if typical < CLEARLY:
        return None
    return SlowRank(ranks[winner], int((slowest == winner).sum()), len(steps), typical)
