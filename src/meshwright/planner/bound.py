"""A lower bound on the step time of every frame, so that a search may leave out what cannot come near the best plan.

A frame's microbatch costs at least what the whole model costs on one pipeline stage, divided by the stages: the slowest
stage is no faster than the mean one; bubble, recomputation, pipeline and data-parallel time only add. That cost depends
on the in-layer setting alone, so it is priced once per setting, by the cost model itself: the turn of one microbatch at
pp = 1 with the least dp that holds the experts. tests/planner/test_bound.py holds the bound against `evaluate` on
random configurations.
"""

from __future__ import annotations

import numpy as np

from meshwright.cost.blueprint import blueprint
from meshwright.cost.candidates import RECOMPUTES, SCHEDULES, Candidates, FloatArray, IntArray, distinct
from meshwright.cost.evaluate import machine_of
from meshwright.cost.stack import Stack
from meshwright.cost.step import turn_seconds
from meshwright.cost.workload import Workload
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import Recompute, Schedule
from meshwright.models.spec import ModelSpec
from meshwright.planner.enumerate import Space
from meshwright.planner.table import Table, keep

SETTING = ("tp", "sequence_parallel", "cp", "ep", "expert_tp", "micro_batch")
PAIRED = SCHEDULES.index(Schedule.DUALPIPEV)
"""The schedule that hides expert-parallel communication behind another chunk's compute."""
PER_MICROBATCH = ("forward", "backward", "tp", "cp", "ep")
SAFETY = 0.999
"""Rounding of sums in another order must not push the bound above the step."""


def step_lower_bounds(
    model: ModelSpec, cluster: Cluster, workload: Workload, configurations: Space, stack: Stack
) -> FloatArray:
    """Seconds that no configuration of a frame can beat, for every frame of a space by schedule."""
    frames = configurations.frames
    paired = frames["schedule"] == PAIRED
    first, inverse = distinct([paired, *(frames[name] for name in SETTING)])
    settings = keep(frames | {"paired": paired.astype(np.int64)}, first)

    rows = _on_one_stage(settings, configurations)
    parts = turn_seconds(blueprint(model, workload, rows, stack), machine_of(cluster, stack))
    each = np.sum([parts[name] for name in PER_MICROBATCH], axis=0)
    microbatches = configurations.global_batch // (frames["dp"] * frames["micro_batch"])
    return SAFETY * each[inverse] * microbatches / frames["pp"]


def _on_one_stage(settings: Table, configurations: Space) -> Candidates:
    """The settings as whole models on one stage for one microbatch, with the fewest replicas that hold the experts."""
    experts = settings["ep"] * settings["expert_tp"]
    dp = experts // np.gcd(experts, settings["cp"] * settings["tp"])
    one: IntArray = np.ones_like(dp)
    return Candidates(
        dp=dp,
        tp=settings["tp"],
        pp=one,
        cp=settings["cp"],
        ep=settings["ep"],
        expert_tp=settings["expert_tp"],
        vpp=one + settings["paired"],
        sequence_parallel=settings["sequence_parallel"] > 0,
        micro_batch=settings["micro_batch"],
        global_batch=dp * settings["micro_batch"],
        schedule=np.where(settings["paired"] > 0, PAIRED, SCHEDULES.index(Schedule.ONE_F_ONE_B)),
        zero=0 * one,
        zero_shards=dp * settings["cp"],
        recompute=one * RECOMPUTES.index(Recompute.NONE),
        recompute_every=one,
        heads_exchanged=one == 0,
        precision=configurations.precision,
    )
