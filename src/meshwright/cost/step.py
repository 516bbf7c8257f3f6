"""Time of a training step: stages, pipeline, gradient reduction, optimizer - every part in seconds, per candidate.

In: a blueprint and the machine that prices it. Out: `StepArrays`: parts [n] that sum to the step. The slowest stage
sets the pace of the steady state (m microbatches); filling and draining the pipeline adds the bubble of the schedule's
closed form. Every level of the blueprint is priced once and gathered into the next finer one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from meshwright.cost.blueprint import Blueprint, stage_sums
from meshwright.cost.candidates import Candidates, FloatArray, IntArray
from meshwright.cost.collectives import Network
from meshwright.cost.compute import head_times, layer_times, shop
from meshwright.cost.device import Device
from meshwright.cost.exposed import (
    StateCommunication,
    Wires,
    boundary_communication,
    hide,
    layer_communication,
    state_communication,
)
from meshwright.cost.stack import Stack
from meshwright.cost.stalls import stalled_seconds
from meshwright.cost.turns import BLOCK_PARTS, Kernels, Messages, TurnMessages, Turns, turns
from meshwright.hardware.spec import Cluster
from meshwright.models.spec import ModelSpec, MoeMlp
from meshwright.schedules.closed_form import bubble_microbatches


@dataclass(frozen=True)
class Machine:
    """What prices a candidate beside the workload: the cluster and the constants of device, network and software."""

    cluster: Cluster
    device: Device
    network: Network
    stack: Stack

    @property
    def bandwidth(self) -> float:
        """Bytes/s of memory that streaming kernels reach."""
        return self.cluster.accelerator.memory_bandwidth * self.device.memory

    def wires(self, model: ModelSpec) -> Wires:
        """What prices the model's messages."""
        routed = [kind.mlp.top_k for kind in model.kinds if isinstance(kind.mlp, MoeMlp)]
        copies = float(max(routed)) if routed and self.stack.ep_domain_copies else 1.0
        stack = self.stack
        return Wires(self.cluster, self.network, stack.rank_order, copies, stack.shard_messages, stack.piece_copy_s)


@dataclass(frozen=True)
class StepArrays:
    """Seconds [n] by part (estimate.TIME_PARTS) and hidden seconds by axis (empty unless asked for), of the stage that
    sets the pace."""

    parts_s: dict[str, FloatArray]
    hidden_s: dict[str, FloatArray]
    pace_stage: IntArray
    step_s: FloatArray


def step_arrays(plan: Blueprint, machine: Machine, detail: bool = True) -> StepArrays:
    """Time of every candidate of a blueprint; what is hidden only where `detail` is wanted."""
    return assembled(plan, machine, kernels_of(plan, machine), messages_of(plan, machine), detail)


def with_stalls(
    step: StepArrays, model: ModelSpec, candidates: Candidates, memory_bytes: FloatArray, machine: Machine
) -> StepArrays:
    """The step with the stalls of its software (cost.stalls), which the host waits out."""
    if not machine.stack.stalls:
        return step
    stalled = stalled_seconds(model, candidates, memory_bytes, machine.cluster, machine.stack)
    parts = step.parts_s | {"host": step.parts_s["host"] + stalled}
    return replace(step, parts_s=parts, step_s=step.step_s + stalled)


def kernels_of(plan: Blueprint, machine: Machine) -> Kernels:
    """Seconds of all kernels of the units."""
    prices = shop(machine.cluster.accelerator, machine.device, machine.stack, plan.workload, plan.units)
    return Kernels(layer_times(plan.model, prices), head_times(plan.model, prices))


def turn_messages_of(plan: Blueprint, machine: Machine) -> TurnMessages:
    """Seconds of the messages of the units and blocks."""
    wires, roles = machine.wires(plan.model), plan.holds.shape[2]
    return TurnMessages(
        layers=layer_communication(wires, plan.units, plan.unit_terms, roles),
        boundary=boundary_communication(wires, plan.blocks, plan.pipeline_terms),
    )


def messages_of(plan: Blueprint, machine: Machine) -> Messages:
    """Seconds of all messages of the units, blocks and states."""
    wires, roles = machine.wires(plan.model), plan.holds.shape[2]
    turn = turn_messages_of(plan, machine)
    state = state_communication(wires, plan.states, plan.state_terms, roles)
    return Messages(turn.layers, turn.boundary, state)


def turn_seconds(plan: Blueprint, machine: Machine) -> dict[str, FloatArray]:
    """A microbatch's turn by part [n], at the stage that sets the pace: what a step has `microbatches` times."""
    turn = turns(
        plan, kernels_of(plan, machine), turn_messages_of(plan, machine), machine.stack, machine.cluster, detail=False
    )
    return {name: seconds.take(plan.block_of) for name, seconds in turn.parts.items()}


def step_seconds(plan: Blueprint, machine: Machine) -> FloatArray:
    """`step_arrays(..).step_s` [n] without its parts: what a search asks of millions."""
    found = _Levels.of(plan, machine, kernels_of(plan, machine), messages_of(plan, machine), hidden=False)
    step_s, waiting = found.step(plan)
    step_s += waiting
    return step_s


def assembled(
    plan: Blueprint, machine: Machine, kernels: Kernels, messages: Messages, detail: bool = True
) -> StepArrays:
    """The step from the seconds of its kernels and messages."""
    found = _Levels.of(plan, machine, kernels, messages, hidden=detail)
    step_s, waiting = found.step(plan)
    block = plan.block_of
    parts = {name: seconds[block] for name, seconds in found.flowing.items()}
    parts["dp"] = found.data + waiting
    parts["optimizer"] = found.optimizer[plan.cell_of]
    overlapped: dict[str, FloatArray] = {}
    if detail:
        overlapped = {axis: (found.count * seconds)[block] for axis, seconds in found.turn.hidden.items()}
        overlapped["dp"] = found.hidden
    return StepArrays(
        parts_s=parts,
        hidden_s=overlapped,
        pace_stage=found.turn.pace_stage[block],
        step_s=step_s + waiting,
    )


@dataclass(frozen=True)
class _Levels:
    """Seconds of the levels: `flowing` by part, the microbatches `count` and the share `waiting` for slow nodes [b],
    exposed (`data`) and hidden traffic of parameters and gradients [n], optimizer [e]."""

    turn: Turns
    count: FloatArray
    flowing: dict[str, FloatArray]
    waiting: FloatArray
    data: FloatArray
    hidden: FloatArray
    optimizer: FloatArray

    @classmethod
    def of(cls, plan: Blueprint, machine: Machine, kernels: Kernels, messages: Messages, hidden: bool) -> _Levels:
        stack = machine.stack
        turn = turns(plan, kernels, messages, stack, machine.cluster, hidden)
        count = np.maximum(plan.blocks.microbatches, 1).astype(np.float64)
        flowing = {name: count * turn.parts[name] for name in BLOCK_PARTS}
        flowing["bubble"] = _bubble(plan, turn)
        flowing["host"] += stack.step_host_s
        nodes = np.maximum(plan.blocks.world / machine.cluster.gpus_per_node, 1.0)
        data, behind = _data_parallel(plan, turn, messages.state, stack, hidden)
        return cls(
            turn=turn,
            count=count,
            flowing=flowing,
            waiting=stack.straggler * np.log2(nodes),
            data=data,
            hidden=behind,
            optimizer=plan.optimizer_bytes.max(axis=1) * (stack.optimizer_passes / machine.bandwidth),
        )

    def step(self, plan: Blueprint) -> tuple[FloatArray, FloatArray]:
        """Seconds of the step, and of waiting for slow nodes beside it [n]."""
        once = self.optimizer.take(plan.cell_of)
        once += self.data
        step_s: FloatArray = np.sum(list(self.flowing.values()), axis=0).take(plan.block_of)
        step_s += once
        return step_s, self.waiting.take(plan.block_of) * step_s


def _bubble(plan: Blueprint, turn: Turns) -> FloatArray:
    """Idle seconds of filling and draining the pipeline [b], at the mean stage's pace."""
    blocks = plan.blocks
    idle = bubble_microbatches(
        blocks.schedule,
        blocks.pp,
        blocks.microbatches,
        blocks.vpp,
        turn.mean_forward,
        turn.mean_backward,
        turn.mean_weight_gradient,
    )
    return np.maximum(idle, 0.0)


BLOCK_ROWS = 16_384
"""Candidates that are worked on at once: their temporaries stay in the processor's cache."""


def _data_parallel(
    plan: Blueprint, turn: Turns, state: StateCommunication, stack: Stack, hidden: bool
) -> tuple[FloatArray, FloatArray]:
    """(exposed, hidden) seconds of parameters and gradients, of the worst stage [n]; the latter 0 where not wanted.

    A reduction hides behind a backward turn (ZeRO-0 and 1: the last microbatch's), parameter gathering of ZeRO-1 and 2
    behind the first forward turn, ZeRO-3 traffic behind the microbatch's whole turn.
    """
    table = np.stack([seconds.T for seconds in (state.reduction, state.gathering, state.final)], axis=1)
    # stage by stage over contiguous columns: this is the one price that is worked out for nearly every candidate
    costs = stage_sums(plan.holds, plan.shape_of_cell, plan.state_of_cell, table)
    spans = turn.forward.T, turn.backward.T
    count = np.maximum(plan.blocks.microbatches, 1).astype(np.float64).take(plan.block_of)
    zero, reductions = plan.zero, np.array([stack.reduction_overlap(stage) for stage in range(3)])
    exposed, under = np.zeros(len(zero)), np.zeros(len(zero))
    for fully, chosen in ((False, zero < 3), (True, zero == 3)):
        every = np.flatnonzero(chosen)
        for start in range(0, len(every), BLOCK_ROWS):
            rows = every[start : start + BLOCK_ROWS]
            often, share = count.take(rows), np.full(1, stack.fsdp_overlap)
            if not fully:
                share = reductions[zero.take(rows)]
                often = np.where(zero.take(rows) >= 2, often, 1.0)
            cell, block = plan.cell_of.take(rows), plan.block_of.take(rows)
            exposed[rows], behind = _worst_stage(cell, block, often, fully, share, costs, spans, stack, hidden)
            if hidden:
                under[rows] = behind
    return exposed, under


def _worst_stage(
    cell: IntArray,
    block: IntArray,
    often: FloatArray,
    fully: bool,
    share: FloatArray,
    costs: FloatArray,
    spans: tuple[FloatArray, FloatArray],
    stack: Stack,
    hidden: bool,
) -> tuple[FloatArray, FloatArray]:
    """`_data_parallel` of some candidates that are all ZeRO-3 or none, `often` their reductions in a step, of
    which `share` may hide. `costs` [3, S, e] by cell, `spans` [S, b] by block."""
    most, behind = np.zeros(len(cell)), np.zeros(len(cell))
    for reduction, gathering, final, forward, backward in zip(*costs, *spans, strict=True):
        reduced, gathered = reduction.take(cell), gathering.take(cell)
        ahead, back = forward.take(block), backward.take(block)
        if fully:
            bare, under = hide(reduced + gathered, share, ahead + back, stack.contention)
            bare *= often
            under = often * under if hidden else under
        else:
            bare, under = hide(reduced, share, back, stack.contention)
            once, first = hide(gathered, stack.gather_overlap, ahead, stack.contention)
            bare *= often
            bare += once
            under = often * under + first if hidden else under
        bare += final.take(cell)
        np.maximum(most, bare, out=most)
        if hidden:
            np.maximum(behind, under, out=behind)
    return most, behind
