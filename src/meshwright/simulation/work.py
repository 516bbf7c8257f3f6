"""How long everything of a step takes, stage by stage and chunk by chunk: what a replay needs to know.

In: one configuration and the machine that prices it. Out: `StepWork`. All seconds are the cost model's own
(cost.turns, cost.exposed); the rule for what hides inside a pass is applied there, stage boundaries and data-parallel
traffic are left to the replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from meshwright.cost.blueprint import OVERLAP, PLAIN, Blueprint
from meshwright.cost.candidates import FloatArray
from meshwright.cost.exposed import LAYER_AXES, StateCommunication, hide
from meshwright.cost.stages import chunk_layers, stage_layers
from meshwright.cost.step import Machine
from meshwright.cost.turns import Kernels, Messages, Turns, turns
from meshwright.ledger import Phase
from meshwright.schedules.placement import V_SHAPED

PASSES = (Phase.FORWARD, Phase.BACKWARD)


@dataclass(frozen=True)
class InLayer:
    """Messages of one axis in one pass of a chunk: seconds on the wire, and the part that the pass waits for."""

    wire_s: float
    exposed_s: float


@dataclass(frozen=True)
class ChunkWork:
    """Seconds of one microbatch through one chunk. `backward_s` is the whole backward pass, `weight_s` the part of it
    that makes weight gradients; `in_layer` by (axis, pass)."""

    forward_s: float
    backward_s: float
    weight_s: float
    in_layer: dict[tuple[str, Phase], InLayer]


@dataclass(frozen=True)
class StageWork:
    """Per stage. `gather_s` waits before the first forward pass; `reduction_s` is one gradient reduction, `deferred`
    whether it happens once, after the last microbatch; `final_s` follows it, then the optimizer."""

    chunks: dict[int, ChunkWork]
    gather_wire_s: float
    gather_s: float
    reduction_s: float
    deferred: bool
    final_s: float
    optimizer_s: float


@dataclass(frozen=True)
class StepWork:
    """`message_s` over a stage boundary, forward and backward; shares that may hide, and what hiding costs."""

    stages: tuple[StageWork, ...]
    message_s: tuple[float, float]
    pp_overlap: float
    dp_overlap: float
    contention: float


def step_work(plan: Blueprint, machine: Machine, kernels: Kernels, messages: Messages) -> StepWork:
    """Work of the only candidate of a blueprint."""
    stack, config = machine.stack, plan.candidates.config(0)
    silent = replace(messages, boundary=(np.zeros(1), np.zeros(1)))
    own = turns(plan, kernels, silent, stack, machine.cluster)
    without = {axis: turns(plan, kernels, silenced(silent, axis), stack, machine.cluster) for axis in LAYER_AXES}
    roles = _role_of_stage(plan)
    owner = _chunk_owners(plan)
    stages = [
        _stage(plan, machine, kernels, messages, own, without, role, [c for c, o in enumerate(owner) if o == stage])
        for stage, role in enumerate(roles)
    ]
    plain = OVERLAP[plan.candidates.schedule[0]] == PLAIN
    forward, backward = (float(message[0]) for message in messages.boundary)
    return StepWork(
        stages=tuple(stages),
        message_s=(forward, backward) if config.pp > 1 else (0.0, 0.0),
        pp_overlap=stack.pp_overlap if plain else stack.pp_overlap_interleaved,
        dp_overlap=stack.reduction_overlap(config.zero),
        contention=stack.contention,
    )


def silenced(messages: Messages, axis: str) -> Messages:
    """The messages with those of one axis taking no time."""
    if axis == "pp":
        return replace(messages, boundary=(np.zeros(1), np.zeros(1)))
    if axis == "dp":
        state = messages.state
        none = np.zeros_like(state.reduction)
        return replace(messages, state=StateCommunication(none, none, none))
    kept = {key: seconds if key[0] != axis else np.zeros_like(seconds) for key, seconds in messages.layers.items()}
    return replace(messages, layers=kept)


def _stage(
    plan: Blueprint,
    machine: Machine,
    kernels: Kernels,
    messages: Messages,
    own: Turns,
    without: dict[str, Turns],
    role: int,
    chunks: Sequence[int],
) -> StageWork:
    """Work of one stage, whose role among the distinct stages is `role`."""
    stack, config = machine.stack, plan.candidates.config(0)
    holds = plan.holds[plan.shape_of_cell[0], role]
    state = messages.state
    reduction, gathering, final = (float(holds @ s[0]) for s in (state.reduction, state.gathering, state.final))
    forward, backward = float(own.forward[0, role]), float(own.backward[0, role])
    optimizer = float(plan.optimizer_bytes[0, role]) * stack.optimizer_passes / machine.bandwidth
    gather = 0.0
    if config.zero == 3:
        bare = _bare(reduction + gathering, stack.fsdp_overlap, forward + backward, stack.contention)
        scale = 1.0 + bare / max(forward + backward, 1e-12)
        forward, backward = forward * scale, backward * scale
    else:
        gather = _bare(gathering, stack.gather_overlap, forward, stack.contention)
        if config.zero == 2:
            backward += _bare(reduction, stack.dp_overlap, backward, stack.contention)
    shares = _chunk_shares(plan, kernels, chunks)
    weight = _weight_gradient(plan, kernels, role)
    in_layer = _in_layer(plan, messages, own, without, role)
    return StageWork(
        chunks={
            chunk: ChunkWork(
                forward * share,
                backward * share,
                min(weight, backward) * share,
                {key: InLayer(m.wire_s * share, m.exposed_s * share) for key, m in in_layer.items()},
            )
            for chunk, share in zip(chunks, shares, strict=True)
        },
        gather_wire_s=gathering if config.zero < 3 else 0.0,
        gather_s=gather,
        reduction_s=reduction,
        deferred=config.zero < 2,
        final_s=final,
        optimizer_s=optimizer,
    )


def _bare(seconds: float, share: float, behind: float, contention: float) -> float:
    """What cannot hide (`cost.exposed.hide`)."""
    exposed, _ = hide(np.array(seconds), share, np.array(behind), contention)
    return float(exposed)


def _in_layer(
    plan: Blueprint, messages: Messages, own: Turns, without: dict[str, Turns], role: int
) -> dict[tuple[str, Phase], InLayer]:
    """Messages inside the passes of a stage; exposed is by how much the pass is shorter without them."""
    holds = plan.holds[plan.shape_of_block[0], role]
    found: dict[tuple[str, Phase], InLayer] = {}
    for axis in LAYER_AXES:
        for phase in PASSES:
            wire = float(holds @ messages.layers[axis, phase][0])
            if wire > 0:
                here, there = (_pass(t, phase)[0, role] for t in (own, without[axis]))
                found[axis, phase] = InLayer(wire, max(float(here - there), 0.0))
    return found


def _pass(turn: Turns, phase: Phase) -> FloatArray:
    return turn.forward if phase is Phase.FORWARD else turn.backward


def _weight_gradient(plan: Blueprint, kernels: Kernels, role: int) -> float:
    layers = plan.stages.layers[plan.shape_of_block[0], role]
    return float(layers @ kernels.layers.weight_gradient[0])


def _chunk_shares(plan: Blueprint, kernels: Kernels, chunks: Sequence[int]) -> list[float]:
    """How a stage's seconds divide among its chunks: by the time of their forward and backward kernels."""
    config, head = plan.candidates.config(0), kernels.head
    layers = chunk_layers(plan.model.pattern, len(plan.model.kinds), config.pp, config.vpp, config.layer_split)
    per_layer = kernels.layers.forward[0] + kernels.layers.backward[0] + kernels.layers.recompute[0]
    last = config.pp * config.vpp - 1
    seconds = [
        float(layers[c] @ per_layer)
        + (float(head.embedding[0]) if c == 0 else 0.0)
        + (float(head.forward[0] + head.backward[0]) if c == last else 0.0)
        for c in chunks
    ]
    total = sum(seconds)
    return [s / total for s in seconds] if total > 0 else [1.0 / len(chunks)] * len(chunks)


def _chunk_owners(plan: Blueprint) -> list[int]:
    config = plan.candidates.config(0)
    v_shaped = config.schedule in V_SHAPED
    return stage_layers(plan.model, config.pp, config.vpp, v_shaped, config.layer_split)[1].tolist()


def _role_of_stage(plan: Blueprint) -> list[int]:
    """The role of every real stage: equal layers, ends and boundaries."""
    config = plan.candidates.config(0)
    v_shaped = config.schedule in V_SHAPED
    layers, owners = stage_layers(plan.model, config.pp, config.vpp, v_shaped, config.layer_split)
    owner: list[int] = owners.tolist()
    crossings = [(a, b) for a, b in pairwise(owner) if a != b]
    table = plan.stages
    known = {
        (
            bool(table.first[0, r]),
            bool(table.last[0, r]),
            int(table.sends[0, r]),
            int(table.receives[0, r]),
            tuple(table.layers[0, r].tolist()),
        ): r
        for r in range(table.index.shape[1])
    }
    return [
        known[
            stage == 0,
            stage == owner[-1],
            sum(a == stage for a, _ in crossings),
            sum(b == stage for _, b in crossings),
            tuple(layers[stage].tolist()),
        ]
        for stage in range(config.pp)
    ]
