"""A microbatch's turn on every stage: compute, exposed communication, host floor - per block of the blueprint.

In: blueprint, seconds of kernels and of messages. Out: `Turns`, arrays over blocks [b, S] and, at the stage that sets
the pace, [b].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.blueprint import OVERLAP, PAIRED, PLAIN, Blueprint, stage_sums
from meshwright.cost.candidates import FloatArray, IntArray
from meshwright.cost.compute import HeadTimes, LayerTimes
from meshwright.cost.exposed import LAYER_AXES, StateCommunication, hide
from meshwright.cost.stack import Stack
from meshwright.cost.stalls import passes_of_a_layer
from meshwright.hardware.spec import Cluster
from meshwright.ledger import Phase
from meshwright.models.spec import MoeMlp

BLOCK_PARTS = ("forward", "backward", "recompute", "tp", "cp", "ep", "pp", "host")
"""Parts of a step that are a microbatch's turn times the number of microbatches."""

HOST_SHARPNESS = 3.0
"""Exponent of the norm that joins host and device time (infinite: the larger counts). Between batches that are bound by
the host and by the device the step of small models on one node is a quarter to a third above the larger of the two."""

HIDING_SHARE = 0.5
"""Of the compute of a pass, what may run beside the communication of one axis."""


@dataclass(frozen=True)
class Turns:
    """Seconds per microbatch. `forward` and `backward` [b, S] are whole turns; `mean_*` [b] means over real stages;
    `parts` and `hidden` [b] are those of the pace-setting stage `pace`."""

    forward: FloatArray
    backward: FloatArray
    mean_forward: FloatArray
    mean_backward: FloatArray
    mean_weight_gradient: FloatArray
    parts: dict[str, FloatArray]
    hidden: dict[str, FloatArray]
    pace_stage: IntArray


@dataclass(frozen=True)
class Kernels:
    """Seconds of computing, of the units."""

    layers: LayerTimes
    head: HeadTimes


@dataclass(frozen=True)
class TurnMessages:
    """Seconds of communicating in a turn: layers of the units [u, R], one boundary of the blocks [b]."""

    layers: dict[tuple[str, Phase], FloatArray]
    boundary: tuple[FloatArray, FloatArray]


@dataclass(frozen=True)
class Messages(TurnMessages):
    """And of parameters and gradients of the states [d, R]."""

    state: StateCommunication


def turns(
    plan: Blueprint, kernels: Kernels, messages: TurnMessages, stack: Stack, cluster: Cluster, detail: bool = True
) -> Turns:
    """Every block's turns; what is hidden only where `detail` is wanted. Inside, arrays are [S, b]: there are few
    stages and many blocks."""
    at = _stage_seconds(plan, _unit_seconds(plan, kernels, messages, stack))
    compute = {Phase.FORWARD: at["forward"], Phase.BACKWARD: at["backward"] + at["recompute"]}
    nothing = np.zeros_like(at["forward"])
    axes = (*LAYER_AXES, "pp")
    exposed: dict[str, FloatArray] = dict.fromkeys(axes, nothing)
    hidden: dict[str, FloatArray] = dict.fromkeys(axes, nothing)
    turn = dict(compute)
    for axis, phase, seconds, share in _communication(plan, at, messages, stack):
        if not seconds.any():
            continue
        room = _room(plan, axis) * compute[phase]
        bare, behind = hide(seconds, share, room, stack.contention)
        turn[phase] = turn[phase] + bare
        exposed[axis] = exposed[axis] + bare
        hidden[axis] = hidden[axis] + behind
    device = turn[Phase.FORWARD] + turn[Phase.BACKWARD]
    host = _beyond(at["host"], _waiting_seconds(plan, stack, cluster), device) + _fixed_seconds(plan, stack)
    forward, backward = (turn[phase] + 0.5 * host for phase in (Phase.FORWARD, Phase.BACKWARD))
    rows, pace = np.arange(len(plan.blocks)), (device + host).argmax(axis=0)
    parts = {name: at[name] for name in ("forward", "backward", "recompute")} | exposed | {"host": host}
    weight, pp = _of_blocks(plan, plan.stages.weight), plan.blocks.pp

    def mean(per_stage: FloatArray) -> FloatArray:
        return np.einsum("sb,sb->b", weight, per_stage) / pp

    return Turns(
        forward=forward.T,
        backward=backward.T,
        mean_forward=mean(forward),
        mean_backward=mean(backward),
        mean_weight_gradient=mean(at["weight_gradient"]),
        parts={name: parts[name][pace, rows] for name in BLOCK_PARTS},
        hidden={axis: seconds[pace, rows] for axis, seconds in hidden.items()} if detail else {},
        pace_stage=plan.stages.index[plan.shape_of_block, pace],
    )


def _of_blocks(plan: Blueprint, of_shapes: IntArray) -> IntArray:
    """A quantity of the stages of every shape [p, S] as that of the stages of every block [S, b]."""
    return of_shapes.T.take(plan.shape_of_block, axis=1)


def _room(plan: Blueprint, axis: str) -> FloatArray | float:
    """The share of a pass' compute behind which an axis may hide: all of it for experts where another chunk runs at
    the same time."""
    if axis != "ep":
        return HIDING_SHARE
    return np.where(OVERLAP[plan.blocks.schedule] == PAIRED, 1.0, HIDING_SHARE)


def _communication(
    plan: Blueprint, at: dict[str, FloatArray], messages: TurnMessages, stack: Stack
) -> list[tuple[str, Phase, FloatArray, FloatArray | float]]:
    """(axis, phase, seconds [S, b], share that may hide) of everything a turn waits for. Stage boundaries hide better
    under schedules that have other work at hand than the next microbatch's."""
    overlap = OVERLAP[plan.blocks.schedule]
    experts = np.where(overlap == PAIRED, max(stack.ep_overlap, stack.ep_overlap_paired), stack.ep_overlap)
    # a ring passes keys and values while it attends to others; an exchange of heads comes before and after attention
    exchanged = plan.blocks.heads_exchanged
    context = np.where(exchanged, 0.0, stack.cp_overlap) if exchanged.any() else stack.cp_overlap
    share = {"tp": stack.tp_overlap, "cp": context, "ep": experts}
    passes = (Phase.FORWARD, Phase.BACKWARD)
    found: list[tuple[str, Phase, FloatArray, FloatArray | float]] = [
        (axis, phase, at[f"{axis} {phase}"], share[axis]) for axis in LAYER_AXES for phase in passes
    ]
    boundary = np.where(overlap == PLAIN, stack.pp_overlap, stack.pp_overlap_interleaved)
    counts = (plan.stages.sends, plan.stages.receives)
    for phase, message, count in zip(passes, messages.boundary, counts, strict=True):
        found.append(("pp", phase, _of_blocks(plan, count) * message, boundary))
    return found


def _stage_seconds(plan: Blueprint, of_units: dict[str, FloatArray]) -> dict[str, FloatArray]:
    """Seconds of every quantity on the stages of the blocks [S, b], from those per unit and role [u, R]."""
    used = {name: seconds for name, seconds in of_units.items() if seconds.any()}
    table = np.stack([seconds.T for seconds in used.values()], axis=1)
    sums = stage_sums(plan.holds, plan.shape_of_block, plan.unit_of_block, table)
    return dict.fromkeys(of_units, np.zeros(sums.shape[1:])) | dict(zip(used, sums, strict=True))


def _unit_seconds(plan: Blueprint, kernels: Kernels, messages: TurnMessages, stack: Stack) -> dict[str, FloatArray]:
    """Seconds per unit and role [u, R] of everything that a turn consists of."""
    layers, head = kernels.layers, kernels.head
    nothing = np.zeros_like(head.forward)

    def roles(per_layer: FloatArray, first: FloatArray, last: FloatArray) -> FloatArray:
        return np.concatenate([per_layer, np.stack([first, last, first + last, nothing], axis=1)], axis=1)

    table = {
        "forward": roles(layers.forward, head.embedding, head.forward),
        "backward": roles(layers.backward, nothing, head.backward),
        "recompute": roles(layers.recompute, nothing, nothing),
        "weight_gradient": roles(layers.weight_gradient, nothing, nothing),
        "host": roles(_host_seconds(plan, stack), nothing, nothing),
    }
    for axis in LAYER_AXES:
        for phase in (Phase.FORWARD, Phase.BACKWARD):
            table[f"{axis} {phase}"] = messages.layers[axis, phase]
    return table


def _excess(host: FloatArray, device: FloatArray) -> FloatArray:
    """What launching adds to the device's time. Kernels differ in length: where both take about as long, the device
    waits for the host in some places and the host for the device in others, so the larger alone is too little."""
    ratio = host / np.maximum(device, 1e-12)
    return device * ((1.0 + ratio**HOST_SHARPNESS) ** (1.0 / HOST_SHARPNESS) - 1.0)


def _beyond(launching: FloatArray, waiting: FloatArray, device: FloatArray) -> FloatArray:
    """What the host adds to the device's time. Waits of every layer are alike, unlike kernels: a host that also waits
    is behind the device everywhere or nowhere, so the longer of the two counts."""
    behind = np.where(waiting > 0, launching + waiting - device, 0.0)
    return np.maximum(_excess(launching, device), behind)


def _fixed_seconds(plan: Blueprint, stack: Stack) -> FloatArray:
    """What every turn costs whatever it computes [S, b]: the microbatch loop, and messages over stage boundaries."""
    messages = _of_blocks(plan, plan.stages.sends + plan.stages.receives).astype(np.float64)
    turn = stack.microbatch_host_s * plan.blocks.vpp.astype(np.float64)
    return turn + stack.boundary_host_s * messages


def _waiting_seconds(plan: Blueprint, stack: Stack, cluster: Cluster) -> FloatArray:
    """Host time by which tensor-parallel ranks wait for each other in every layer [S, b] where a pipeline's messages
    over the network keep their processors busy."""
    blocks = plan.blocks
    apart = (blocks.pp > 1) & (blocks.tp > 1) & (blocks.world > cluster.domain)
    layers = _of_blocks(plan, plan.stages.layers.sum(axis=2))
    return layers * (np.where(apart, stack.tp_wait_s, 0.0) * blocks.tp * passes_of_a_layer(blocks))


def _host_seconds(plan: Blueprint, stack: Stack) -> FloatArray:
    """Host time to launch a layer's kernels [u, K]: forward, backward, and what is recomputed."""
    units = plan.units
    routed = np.array([isinstance(kind.mlp, MoeMlp) for kind in plan.model.kinds])
    layer = stack.layer_host_s + stack.tp_host_s * (units.tp - 1)
    return passes_of_a_layer(units)[:, None] * (layer[:, None] + stack.moe_host_s * routed)
