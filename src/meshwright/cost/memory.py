"""Training memory of every pipeline stage of every candidate, by kind, and the peak.

In: model, cluster, workload, candidates with their stages and distinct in-layer keys, software stack. Out:
`MemoryArrays` [n, S]. State bytes per parameter follow Rajbhandari et al. 2020 ("ZeRO", section 3); activations follow
Korthikanti et al. 2022 term by term (`cost.layers`), times the microbatches a stage holds at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np

from meshwright.cost.candidates import RECOMPUTES, SCHEDULES, Candidates, FloatArray, IntArray, UnitKeys
from meshwright.cost.layers import EndMemory, LayerMemory, element_bytes, end_memory, layer_memory
from meshwright.cost.stack import Stack, default_stack
from meshwright.cost.stages import Stages
from meshwright.cost.stalls import stopped
from meshwright.cost.workload import Optimizer, Workload
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import Recompute, Schedule
from meshwright.ledger import MemoryKind
from meshwright.models.spec import ModelSpec
from meshwright.schedules.closed_form import live_microbatches

OPTIMIZER_BYTES = {
    Optimizer.ADAM_FP32: 8.0,  # momentum and variance in fp32 (Rajbhandari et al. 2020, section 3.1)
    Optimizer.ADAM_MIXED: 12.0,  # K = 12: and an fp32 master weight
    Optimizer.ADAM_BF16: 4.0,
    Optimizer.ADAM_8BIT: 2.0 * (1 + 4 / 2048),  # one fp32 scale per block of 2048 (Dettmers et al. 2022, section 2)
    Optimizer.SGD: 0.0,
}
"""Bytes of optimizer state per parameter."""

MASTER_BYTES = 4.0

TAKEN_OVER = 2
"""Microbatches of a pipeline's warm-up that later stages have taken when the host has issued the last: one is worked
on, one received."""


@dataclass(frozen=True)
class MemoryArrays:
    """Bytes [n, S] by kind and in total; the fullest stage of each candidate [n]. RESERVED is part of the total:
    compare it with the device's whole memory, `allocated` with what an allocator reports."""

    by_kind: dict[MemoryKind, FloatArray]
    total: FloatArray
    peak_bytes: FloatArray
    peak_stage: IntArray

    @property
    def allocated(self) -> FloatArray:
        return self.total - self.by_kind[MemoryKind.RESERVED]


@dataclass(frozen=True)
class StateBytes:
    """Bytes per parameter on a rank [n] after sharding, of dense and of expert parameters."""

    parameters: tuple[FloatArray, FloatArray]
    gradients: tuple[FloatArray, FloatArray]
    optimizer: tuple[FloatArray, FloatArray]


def expert_shards(candidates: Candidates) -> FloatArray:
    """Ranks that share the sharded state of an expert: its own replicas, fewer under HSDP in the same proportion."""
    replicas = candidates.dp * candidates.cp // candidates.zero_shards
    return np.maximum(candidates.expert_dp // np.maximum(replicas, 1), 1).astype(np.float64)


def state_bytes(workload: Workload, candidates: Candidates, stack: Stack) -> StateBytes:
    """ZeRO-1 shards the optimizer state, ZeRO-2 gradients too, ZeRO-3 parameters too."""
    zero = candidates.zero
    weight = element_bytes(candidates.precision)
    state = OPTIMIZER_BYTES[workload.optimizer]
    half = stack.half_gradients
    master = stack.master_is_parameter and workload.optimizer is Optimizer.ADAM_MIXED
    # FSDP2 keeps one fp32 shard as parameter and master weight; gathered copies are buffers
    weight_3, state_3 = (MASTER_BYTES, state - MASTER_BYTES) if master else (weight, state)

    buckets = np.where(candidates.dp * candidates.cp > 1, stack.bucket_gradients, 0.0)

    def of(shards: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        part = 1.0 / shards
        parameters = np.where(zero == 3, weight_3 * part, weight)
        gradients = workload.gradient_bytes * np.where(zero >= 2, part, 1.0) + np.where(zero < 3, half + buckets, 0.0)
        optimizer = np.where(zero == 3, state_3, state) * np.where(zero >= 1, part, 1.0)
        return parameters, gradients, optimizer

    dense, expert = of(candidates.zero_shards.astype(np.float64)), of(expert_shards(candidates))
    return StateBytes((dense[0], expert[0]), (dense[1], expert[1]), (dense[2], expert[2]))


def over_stage(stages: Stages, per_layer: FloatArray, inverse: IntArray) -> FloatArray:
    """Sum over a stage's layers of a per-layer quantity [u, K] -> [n, S]."""
    total = stages.layers[:, :, 0] * per_layer[inverse, 0][:, None]
    for k in range(1, per_layer.shape[1]):
        total = total + stages.layers[:, :, k] * per_layer[inverse, k][:, None]
    return total


def largest_in_stage(stages: Stages, per_layer: FloatArray, inverse: IntArray) -> FloatArray:
    """Largest over the layer kinds that a stage holds of a per-layer quantity [u, K] -> [n, S]."""
    largest = (stages.layers[:, :, 0] > 0) * per_layer[inverse, 0][:, None]
    for k in range(1, per_layer.shape[1]):
        largest = np.maximum(largest, (stages.layers[:, :, k] > 0) * per_layer[inverse, k][:, None])
    return largest


def stage_parameters(
    stages: Stages, layers: LayerMemory, ends: EndMemory, inverse: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Dense and expert parameters of a rank on every stage [n, S]. A last stage that is not the first holds its own
    copy of a tied embedding (Narayanan et al. 2021; Megatron's embedding group)."""
    dense = over_stage(stages, layers.dense_parameters, inverse)
    dense = dense + stages.first * ends.embedding_parameters[inverse][:, None]
    dense = dense + stages.last * ends.head_parameters[inverse][:, None]
    if ends.token_parameters.any():
        dense = dense + (stages.last & ~stages.first) * ends.token_parameters[inverse][:, None]
    if not layers.expert_parameters.any():
        return dense, np.zeros((1, 1))
    return dense, over_stage(stages, layers.expert_parameters, inverse)


def _gather_buffers(
    candidates: Candidates, stages: Stages, layers: LayerMemory, ends: EndMemory, inverse: IntArray, stack: Stack
) -> FloatArray:
    """ZeRO-3: gathered weights of the layers in flight and of the root unit (embedding, head), and the gradient of one
    layer before it is reduced (Zhao et al. 2023, "PyTorch FSDP", section 4)."""
    sharded = (candidates.zero == 3) & (candidates.zero_shards > 1)
    if not sharded.any():
        return np.zeros((1, 1))
    weight = element_bytes(candidates.precision)
    per_layer = layers.dense_parameters + layers.expert_parameters
    layer = largest_in_stage(stages, per_layer, inverse)
    root = stages.first * ends.embedding_parameters[inverse][:, None]
    root = root + stages.last * ends.head_parameters[inverse][:, None]
    gathered = layer * (stack.gathered_layers * weight + stack.gathered_gradient_bytes) + root * weight
    return gathered * sharded[:, None]


def held_memory(
    model: ModelSpec, workload: Workload, candidates: Candidates, stages: Stages, keys: UnitKeys, stack: Stack
) -> dict[MemoryKind, FloatArray]:
    """Bytes [n, S] of what a rank holds whatever its microbatches: state, and ZeRO-3's gathered weights."""
    layers = layer_memory(model, workload, keys.candidates, stack)
    ends = end_memory(model, workload, keys.candidates, stack)
    dense, expert = stage_parameters(stages, layers, ends, keys.inverse)
    state = state_bytes(workload, candidates, stack)

    def held(per_parameter: tuple[FloatArray, FloatArray]) -> FloatArray:
        return dense * per_parameter[0][:, None] + expert * per_parameter[1][:, None]

    return {
        MemoryKind.PARAMETERS: held(state.parameters),
        MemoryKind.GRADIENTS: held(state.gradients),
        MemoryKind.OPTIMIZER: held(state.optimizer),
        MemoryKind.BUFFERS: _gather_buffers(candidates, stages, layers, ends, keys.inverse, stack),
    }


def in_flight(candidates: Candidates, stages: Stages) -> FloatArray:
    """Microbatches whose activations a stage holds at once [n, S]."""
    return live_microbatches(
        candidates.schedule[:, None],
        candidates.pp[:, None],
        candidates.microbatches[:, None],
        candidates.vpp[:, None],
        stages.index,
    )


def live_memory(
    model: ModelSpec,
    workload: Workload,
    candidates: Candidates,
    stages: Stages,
    keys: UnitKeys,
    stack: Stack,
    live: FloatArray,
) -> dict[MemoryKind, FloatArray]:
    """Bytes [n, S] of the microbatches `live` that are `in_flight`: activations, logits, messages, the backward pass
    at work."""
    inverse = keys.inverse
    layers = layer_memory(model, workload, keys.candidates, stack)
    ends = end_memory(model, workload, keys.candidates, stack)
    kept = over_stage(stages, layers.kept, inverse) + stages.first * ends.embedded[inverse][:, None]
    activations = kept * live + stages.last * ends.final[inverse][:, None]

    gpipe = (candidates.schedule == SCHEDULES.index(Schedule.GPIPE))[:, None]
    several = (candidates.microbatches > 1)[:, None]
    waiting = (
        np.where(gpipe, (live - 1.0) * stack.logit_kept_bytes, several * stack.logit_carry_bytes) / stack.logit_bytes
    )
    logits = stages.last * ends.logits[inverse][:, None] * (1.0 + waiting)

    full = (candidates.recompute == RECOMPUTES.index(Recompute.FULL))[:, None]
    working = largest_in_stage(stages, layers.working, inverse)
    working = working + full * largest_in_stage(stages, layers.whole, inverse)
    pipelined = (candidates.pp > 1) * ends.boundary[inverse] * stack.pipeline_buffers
    return {
        MemoryKind.ACTIVATIONS: activations,
        MemoryKind.LOGITS: logits,
        MemoryKind.BUFFERS: pipelined[:, None],
        # the loss and a layer's backward pass do not coincide: only the excess over the logits adds to the peak
        MemoryKind.TEMPORARIES: np.maximum(working - logits, 0.0),
    }


def step_memory(
    model: ModelSpec, workload: Workload, candidates: Candidates, stages: Stages, keys: UnitKeys, stack: Stack
) -> FloatArray:
    """Bytes [n, S] of working copies in the optimizer's step, of parameters whose state a rank holds. It comes after
    the last backward pass: only what exceeds the microbatches in flight adds to the peak."""
    layers = layer_memory(model, workload, keys.candidates, stack)
    ends = end_memory(model, workload, keys.candidates, stack)
    dense, expert = stage_parameters(stages, layers, ends, keys.inverse)
    of_dense, of_expert = (
        np.where(candidates.zero >= 1, 1.0 / shards, 1.0)[:, None]
        for shards in (candidates.zero_shards.astype(np.float64), expert_shards(candidates))
    )
    return stack.step_bytes * (dense * of_dense + expert * of_expert)


def pending_memory(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    candidates: Candidates,
    stages: Stages,
    keys: UnitKeys,
    stack: Stack,
) -> FloatArray:
    """Bytes [n, S] of row-parallel outputs whose reduction the host has issued and the device not reached: an allocator
    gives such a buffer out again when the device has run past it (`record_stream`). Without a pipeline as many wait as
    the launch queue holds; in one, at most those of warm-up microbatches that later stages have not taken over. Where
    the job stalls (cost.stalls) the device is never behind, and none wait."""
    live = in_flight(candidates, stages)
    blocks = np.array([(kind.mixer is not None) + (kind.mlp is not None) for kind in model.kinds])
    issued = (stages.layers @ blocks) * np.maximum(live - TAKEN_OVER, 0.0)
    waiting = np.where(
        (candidates.pp == 1)[:, None], stack.pending_messages, np.minimum(issued, stack.pending_messages)
    )
    ahead = (candidates.tp > 1) & ~stopped(candidates, cluster, stack)
    output = end_memory(model, workload, keys.candidates, stack).output[keys.inverse]
    return waiting * np.where(ahead, output, 0.0)[:, None]


def unreturned(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    candidates: Candidates,
    stages: Stages,
    keys: UnitKeys,
    stack: Stack,
    total: FloatArray,
) -> FloatArray | float:
    """Bytes [n, S] of `pending_memory` with its slack, on top of `total` [n, S]; none where the device has no room for
    them: an allocator short of memory waits for the device and takes them back."""
    if not stack.pending_messages:
        return 0.0
    pending = pending_memory(model, cluster, workload, candidates, stages, keys, stack) * (1.0 + stack.allocator_slack)
    return np.where(total + pending <= cluster.accelerator.memory_bytes, pending, 0.0)


def training_memory(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    candidates: Candidates,
    stages: Stages,
    keys: UnitKeys,
    stack: Stack | None = None,
) -> MemoryArrays:
    """Bytes of every kind on a rank of every stage of every candidate."""
    stack = default_stack() if stack is None else stack
    held = held_memory(model, workload, candidates, stages, keys, stack)
    live = live_memory(model, workload, candidates, stages, keys, stack, in_flight(candidates, stages))
    terms = held | live
    terms[MemoryKind.BUFFERS] = held[MemoryKind.BUFFERS] + live[MemoryKind.BUFFERS]
    if stack.step_bytes:
        step = step_memory(model, workload, candidates, stages, keys, stack)
        terms[MemoryKind.TEMPORARIES] = terms[MemoryKind.TEMPORARIES] + np.maximum(
            step - reduce(np.add, live.values()), 0.0
        )
    kept_back = cluster.reserved_bytes + stack.workspace_bytes
    terms[MemoryKind.RESERVED] = kept_back + stack.allocator_slack * reduce(np.add, terms.values())
    terms[MemoryKind.RESERVED] = terms[MemoryKind.RESERVED] + unreturned(
        model, cluster, workload, candidates, stages, keys, stack, reduce(np.add, terms.values())
    )
    by_kind = {kind: np.broadcast_to(term, stages.index.shape) for kind, term in terms.items()}
    total = reduce(np.add, by_kind.values())
    role = total.argmax(axis=1)
    rows = np.arange(len(candidates))
    return MemoryArrays(by_kind, total, total[rows, role], stages.index[rows, role])
