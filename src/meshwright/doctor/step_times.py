"""The steps of a run as arrays, and a mean rank's step taken apart: computing, moving bytes, waiting for others.

In: a `Run` and its config. Out: `StepTimes` [steps, ranks] and `Breakdown`, whose parts sum to the step. In a group the
member that arrives last waits for nobody: the least wait of a step is what the transfer itself takes, the rest of the
others' waits is for slower ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshwright.doctor.run_records import Run
from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig, Schedule
from meshwright.layout.grid import RankLayout, rank_layout
from meshwright.schedules.closed_form import bubble_microbatches

Seconds = NDArray[np.float64]
GROUPS = {"dp": "dp_cp", "tp": "tp", "cp": "cp", "ep": "ep", "expert_dp": "expert_dp", "embedding": "embedding"}
"""Groups of the layout whose members wait for each other on a ledger axis. A pipeline's waits are told apart by the
schedule instead."""
WARM_UP = 2
LEAST_STEPS = 5
MOST_STEPS = 2000
BACKWARD_SHARE = 2.0 / 3.0


@dataclass(frozen=True)
class StepTimes:
    """Seconds [steps, ranks] of the steps that all ranks recorded, newest last, the first two left out."""

    config: HybridParallelConfig
    layout: RankLayout
    hosts: dict[int, str]
    step_s: Seconds
    compute_s: Seconds
    waited_s: dict[str, Seconds]

    @property
    def stages(self) -> NDArray[np.int64]:
        """Pipeline stage of every rank."""
        return self.layout.coordinates(np.arange(self.config.world_size))["pp"]


def step_times(run: Run, config: HybridParallelConfig) -> StepTimes:
    """The arrays of a run; an InputError where too few steps were recorded by all ranks."""
    world = config.world_size
    ranks = {rank.rank: rank for rank in run.ranks if rank.rank < world}
    if len(ranks) < world:
        missing = next(r for r in range(world) if r not in ranks)
        raise InputError(f"{run.folder}: rank {missing} of {world} left no record; the plan must be the run's own")
    shared = {s.step for s in ranks[0].steps}
    for rank in ranks.values():
        shared &= {s.step for s in rank.steps}
    chosen = sorted(shared)[-MOST_STEPS:]
    if len(chosen) >= LEAST_STEPS + WARM_UP:
        chosen = chosen[WARM_UP:]
    if len(chosen) < LEAST_STEPS:
        raise InputError(f"{run.folder}: all ranks recorded {len(chosen)} steps; efficiency needs {LEAST_STEPS}")
    rows = [{s.step: s for s in ranks[r].steps} for r in range(world)]
    axes = sorted({axis for own in rows for n in chosen for axis in own[n].waited_s})

    def array(name: str) -> Seconds:
        return np.array([[getattr(own[n], name) for own in rows] for n in chosen], dtype=np.float64)

    return StepTimes(
        config=config,
        layout=rank_layout(config),
        hosts={r: ranks[r].host for r in range(world)},
        step_s=array("step_s"),
        compute_s=array("compute_s"),
        waited_s={
            axis: np.array([[own[n].waited_s.get(axis, 0.0) for own in rows] for n in chosen], dtype=np.float64)
            for axis in axes
        },
    )


@dataclass(frozen=True)
class Breakdown:
    """A mean rank's step (medians over steps). `transfer_s` by axis: bytes on their way; `skew_s`: waiting for slower
    ranks of a group; `bubble_s`: the schedule's own idle time; `imbalance_s`: waiting for the slowest stage."""

    step_s: float
    compute_s: float
    transfer_s: dict[str, float]
    skew_s: float
    bubble_s: float
    schedule_bubble_s: float
    imbalance_s: float
    stage_compute_s: tuple[float, ...]
    tp_compute_s: tuple[float, ...]

    @property
    def waited_s(self) -> float:
        return self.step_s - self.compute_s


def breakdown(times: StepTimes) -> Breakdown:
    """The parts of the mean rank's step."""
    config = times.config
    compute = float(np.median(times.compute_s.mean(axis=1)))
    transfer: dict[str, float] = {}
    skew = 0.0
    for axis, waited in times.waited_s.items():
        if axis == "pp":
            continue
        least = np.median(least_wait(times, axis).mean(axis=1))
        transfer[axis] = float(least)
        skew += max(0.0, float(np.median(waited.mean(axis=1))) - float(least))
    stages = stage_compute(times)
    own = schedule_bubble(config, float(np.mean(stages)))
    waited_pp = times.waited_s.get("pp")
    piped = 0.0 if waited_pp is None else float(np.median(waited_pp.mean(axis=1)))
    imbalance = min(piped, max(stages) - float(np.mean(stages)))
    bubble = min(own, piped - imbalance)
    if config.pp > 1:
        transfer["pp"] = max(0.0, piped - imbalance - bubble)
    tp = times.layout.coordinates(np.arange(config.world_size))["tp"]
    by_tp = tuple(float(np.median(times.compute_s[:, tp == t])) for t in range(config.tp))
    parts = compute + sum(transfer.values()) + skew + imbalance + bubble
    return Breakdown(parts, compute, transfer, skew, bubble, own, imbalance, stages, by_tp)


def least_wait(times: StepTimes, axis: str) -> Seconds:
    """[steps, ranks]: of each rank's group on an axis, the wait of the member that waited least."""
    waited = times.waited_s[axis]
    least = np.zeros_like(waited)
    for group in groups_of(times, axis):
        least[:, group] = waited[:, group].min(axis=1, keepdims=True)
    return least


def groups_of(times: StepTimes, axis: str) -> list[list[int]]:
    """Ranks that wait for each other on an axis."""
    name = GROUPS.get(axis, axis)
    return [[int(r) for r in row] for row in times.layout.groups(name)]


def stage_compute(times: StepTimes) -> tuple[float, ...]:
    """What a typical rank of each stage computes in a step: the median over its ranks and steps, so that one slow rank
    does not make its stage slow."""
    stages = times.stages
    return tuple(float(np.median(times.compute_s[:, stages == s])) for s in range(times.config.pp))


def schedule_bubble(config: HybridParallelConfig, compute_s: float) -> float:
    """The idle time that the schedule itself leaves a stage which computes so long in a step."""
    if config.pp == 1:
        return 0.0
    one = compute_s / config.num_microbatches
    code = tuple(Schedule).index(config.schedule)
    idle = bubble_microbatches(
        code, config.pp, config.num_microbatches, config.vpp, one * (1 - BACKWARD_SHARE), one * BACKWARD_SHARE
    )
    return float(idle)


def peers(times: StepTimes) -> list[list[int]]:
    """Ranks that do the same work: those of one stage."""
    stages = times.stages
    return [[int(r) for r in np.flatnonzero(stages == s)] for s in range(times.config.pp)]


def crossing(times: StepTimes, axis: str) -> Mapping[str, int]:
    """How many groups of an axis lie on which hosts ('a, b')."""
    found: dict[str, int] = {}
    for group in groups_of(times, "pp" if axis == "pp" else axis):
        words = ", ".join(sorted({times.hosts[r] for r in group}))
        found[words] = found.get(words, 0) + 1
    return found
