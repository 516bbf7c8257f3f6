"""Checks of configurations against a model and a cluster: an error in words for one, a mask for many.

The rules themselves are data in `layout.rules`, so that the planner's enumerator and a user's typed sizes meet the
same ones. Models and clusters come as plain facts, because layout knows neither room.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import InputError
from meshwright.layout.config import V_SHAPED, HybridParallelConfig, Schedule
from meshwright.layout.rules import (
    AGAINST_CLUSTER,
    AGAINST_MODEL,
    CONSISTENCY,
    ClusterFacts,
    Facts,
    ModelFacts,
    Sizes,
    first_violation,
    mask,
)

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


def validate(
    config: HybridParallelConfig, model: ModelFacts | None = None, cluster: ClusterFacts | None = None
) -> None:
    """Raise an InputError that names the first rule which the config breaks, with the nearest valid values."""
    facts = Facts(model or ModelFacts(), cluster or ClusterFacts())
    problem = first_violation(AGAINST_MODEL + AGAINST_CLUSTER, config.sizes(), facts)
    if problem:
        raise InputError(problem)


def violations(
    config: HybridParallelConfig, model: ModelFacts | None = None, cluster: ClusterFacts | None = None
) -> tuple[str, ...]:
    """The messages of all rules that the config breaks."""
    facts = Facts(model or ModelFacts(), cluster or ClusterFacts())
    messages = (first_violation((rule,), config.sizes(), facts) for rule in AGAINST_MODEL + AGAINST_CLUSTER)
    return tuple(m for m in messages if m)


def legal_mask(
    model: ModelFacts | None = None,
    cluster: ClusterFacts | None = None,
    *,
    dp: IntArray,
    tp: IntArray,
    pp: IntArray,
    cp: IntArray,
    ep: IntArray,
    expert_tp: IntArray,
    vpp: IntArray,
    micro_batch: IntArray,
    global_batch: IntArray,
    sequence_parallel: BoolArray,
    schedule: IntArray,
    zero_shards: IntArray | None = None,
    heads_exchanged: BoolArray | None = None,
) -> BoolArray:
    """Which rows are legal: consistent in themselves, and for the model and cluster. Arrays of one length.

    `schedule` holds positions in `tuple(Schedule)`; `heads_exchanged`: cp by all-to-all (None: nowhere).
    Layer splits are not looked at (None: even).
    """
    codes = {s: i for i, s in enumerate(Schedule)}
    sizes = Sizes(
        dp=dp,
        tp=tp,
        pp=pp,
        cp=cp,
        ep=ep,
        expert_tp=expert_tp,
        vpp=vpp,
        micro_batch=micro_batch,
        global_batch=global_batch,
        sequence_parallel=sequence_parallel,
        interleaved=schedule == codes[Schedule.INTERLEAVED],
        v_shaped=np.isin(schedule, [codes[s] for s in V_SHAPED]),
        zero_shards=dp * cp if zero_shards is None else zero_shards,
        heads_exchanged=False if heads_exchanged is None else heads_exchanged,
    )
    facts = Facts(model or ModelFacts(), cluster or ClusterFacts())
    return mask(CONSISTENCY + AGAINST_MODEL + AGAINST_CLUSTER, sizes, facts, len(np.asarray(tp)))
