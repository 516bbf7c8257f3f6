"""Time of a training step: stages, pipeline, gradient reduction, optimizer - every part in seconds, per candidate.

In: layer and head times of the distinct keys, communication times, the state's bytes, candidates with their stages.
Out: `StepArrays`: parts [n] that sum to the step. The slowest stage sets the pace of the steady state (m microbatches);
filling and draining the pipeline adds the bubble of the schedule's closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.candidates import SCHEDULES, Candidates, FloatArray, IntArray
from meshwright.cost.compute import HeadTimes, LayerTimes
from meshwright.cost.exposed import CommunicationTimes, Split, hide
from meshwright.cost.stack import Stack
from meshwright.cost.stages import Stages
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import Recompute, Schedule
from meshwright.schedules.closed_form import bubble_microbatches

MICROBATCH_AXES = ("tp", "cp", "ep", "pp")


@dataclass(frozen=True)
class StepArrays:
    """Seconds [n] by part (estimate.TIME_PARTS) and hidden seconds by axis, of the slowest stage."""

    parts_s: dict[str, FloatArray]
    hidden_s: dict[str, FloatArray]
    pace_stage: IntArray

    @property
    def step_s(self) -> FloatArray:
        return np.sum(list(self.parts_s.values()), axis=0)


@dataclass(frozen=True)
class StageTimes:
    """Seconds per microbatch of each stage role [n, S]: device compute, exposed communication, host excess."""

    forward: FloatArray
    backward: FloatArray
    recompute: FloatArray
    weight_gradient: FloatArray
    axes_forward: dict[str, Split]
    axes_backward: dict[str, Split]
    host: FloatArray

    @property
    def turn_forward(self) -> FloatArray:
        """A microbatch's forward turn on a stage: compute, exposed communication, half of the host excess."""
        return self.forward + sum(s.exposed for s in self.axes_forward.values()) + 0.5 * self.host

    @property
    def turn_backward(self) -> FloatArray:
        exposed = sum(s.exposed for s in self.axes_backward.values())
        return self.backward + self.recompute + exposed + 0.5 * self.host

    @property
    def turn(self) -> FloatArray:
        return self.turn_forward + self.turn_backward


def over_stages(stages: Stages, per_layer: FloatArray, inverse: IntArray) -> FloatArray:
    """Sum over the layers of a stage: [u, K] -> [n, S]."""
    total = stages.layers[:, :, 0] * per_layer[inverse, 0][:, None]
    for kind in range(1, per_layer.shape[1]):
        total = total + stages.layers[:, :, kind] * per_layer[inverse, kind][:, None]
    return total


def stage_times(
    candidates: Candidates,
    stages: Stages,
    inverse: IntArray,
    layers: LayerTimes,
    head: HeadTimes,
    communication: CommunicationTimes,
    stack: Stack,
) -> StageTimes:
    """Per microbatch and stage: compute from the layers held, communication from the ledger, the host's floor."""
    microbatches = np.maximum(candidates.microbatches, 1)[:, None].astype(np.float64)
    forward = over_stages(stages, layers.forward, inverse)
    forward = forward + stages.first * head.embedding[inverse][:, None] + stages.last * head.forward[inverse][:, None]
    backward = over_stages(stages, layers.backward, inverse) + stages.last * head.backward[inverse][:, None]
    recompute = over_stages(stages, layers.recompute, inverse)
    weight = over_stages(stages, layers.weight_gradient, inverse)
    share = overlap_shares(candidates, stack)
    ahead, back = (
        {
            axis: hide(times[axis] / microbatches, share[axis], 0.5 * compute, stack.contention)
            for axis in MICROBATCH_AXES
        }
        for times, compute in ((communication.forward, forward), (communication.backward, backward))
    )
    device = forward + backward + recompute
    device = device + sum(s.exposed for s in ahead.values()) + sum(s.exposed for s in back.values())
    host = host_seconds(candidates, stages, stack)
    excess = np.maximum(host - device, 0.0) + stack.microbatch_host_s * candidates.vpp[:, None].astype(np.float64)
    return StageTimes(forward, backward, recompute, weight, ahead, back, excess)


def overlap_shares(candidates: Candidates, stack: Stack) -> dict[str, FloatArray | float]:
    """The share of each axis' communication that may hide; stage boundaries hide better when interleaved."""
    interleaved = (candidates.schedule != SCHEDULES.index(Schedule.ONE_F_ONE_B)) & (
        candidates.schedule != SCHEDULES.index(Schedule.GPIPE)
    )
    pipeline = np.where(interleaved, stack.pp_overlap_interleaved, stack.pp_overlap)[:, None]
    return {"tp": stack.tp_overlap, "cp": stack.cp_overlap, "ep": stack.ep_overlap, "pp": pipeline}


def host_seconds(candidates: Candidates, stages: Stages, stack: Stack) -> FloatArray:
    """Host time to launch a microbatch's kernels on a stage: forward, backward, and what is recomputed."""
    full = candidates.recompute == list(Recompute).index(Recompute.FULL)
    again = np.where(full, 1.0 / candidates.recompute_every, 0.0)
    passes = 2.0 + again
    layers = stages.layers.sum(axis=2).astype(np.float64)
    return layers * (passes * stack.layer_host_s)[:, None]


def pipeline(candidates: Candidates, stages: Stages, times: StageTimes) -> tuple[IntArray, FloatArray]:
    """The role that sets the pace [n], and the seconds of bubble: the closed form on the mean stage."""
    pace = times.turn.argmax(axis=1)
    pp = candidates.pp.astype(np.float64)

    def mean(per_stage: FloatArray) -> FloatArray:
        return (stages.weight * per_stage).sum(axis=1) / pp

    bubble = bubble_microbatches(
        candidates.schedule,
        candidates.pp,
        candidates.microbatches,
        candidates.vpp,
        mean(times.turn_forward),
        mean(times.turn_backward),
        mean(times.weight_gradient),
    )
    return pace, np.maximum(bubble, 0.0)


def step_arrays(
    candidates: Candidates,
    stages: Stages,
    times: StageTimes,
    communication: CommunicationTimes,
    optimizer_bytes: FloatArray,
    bandwidth: float,
    cluster: Cluster,
    stack: Stack,
) -> StepArrays:
    """Sum the step. `optimizer_bytes` [n, S] is what the optimizer step moves through memory."""
    pace, bubble = pipeline(candidates, stages, times)
    rows = np.arange(len(candidates))
    count = np.maximum(candidates.microbatches, 1).astype(np.float64)

    def at_pace(per_stage: FloatArray) -> FloatArray:
        return per_stage[rows, pace]

    parts = {
        "forward": count * at_pace(times.forward),
        "backward": count * at_pace(times.backward),
        "recompute": count * at_pace(times.recompute),
    }
    hidden: dict[str, FloatArray] = {}
    for axis in MICROBATCH_AXES:
        both = (times.axes_forward[axis], times.axes_backward[axis])
        parts[axis] = count * sum(at_pace(s.exposed) for s in both)
        hidden[axis] = count * sum(at_pace(s.hidden) for s in both)
    data = data_parallel(candidates, times, communication, stack)
    parts["dp"] = data.exposed.max(axis=1) + communication.final.max(axis=1)
    hidden["dp"] = data.hidden.max(axis=1)
    parts["bubble"] = bubble
    parts["optimizer"] = optimizer_bytes.max(axis=1) * stack.optimizer_passes / bandwidth
    parts["host"] = count * at_pace(times.host) + stack.step_host_s
    nodes = np.maximum(candidates.world / cluster.gpus_per_node, 1.0)
    waiting = stack.straggler * np.log2(nodes) * np.sum(list(parts.values()), axis=0)
    parts["dp"] = parts["dp"] + waiting
    return StepArrays(parts, hidden, stages.index[rows, pace])


def data_parallel(candidates: Candidates, times: StageTimes, communication: CommunicationTimes, stack: Stack) -> Split:
    """Gradient reduction hides behind the backward pass of the last microbatch, parameter gathering behind the forward
    pass of the first, ZeRO-3 traffic behind all compute of the step."""
    contention = stack.contention
    count = np.maximum(candidates.microbatches, 1)[:, None]
    reduced = hide(communication.reduction, stack.dp_overlap, times.turn_backward, contention)
    gathered = hide(communication.gathering, stack.gather_overlap, times.turn_forward, contention)
    sharded = hide(communication.sharded, stack.fsdp_overlap, count * times.turn, contention)
    return Split(
        reduced.exposed + gathered.exposed + sharded.exposed, reduced.hidden + gathered.hidden + sharded.hidden
    )
