"""Memory of this project's own runtime, a stage at a time: what the dry run is held against, and what cures must fit.

State is priced as for every stack. What is in flight is walked through as the runtime allocates it (cost.program) for
the families that are written down there, else a sum of terms.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from meshwright.cost.candidates import Candidates, FloatArray, UnitKeys, unit_keys
from meshwright.cost.memory import held_memory, in_flight, live_memory
from meshwright.cost.program.memory import program_memory, written_down
from meshwright.cost.program.uneven_state import uneven_state
from meshwright.cost.stack import Stack, stacks
from meshwright.cost.stages import Stages, every_stage
from meshwright.cost.traffic_term import RankPlace
from meshwright.cost.workload import Optimizer, Workload
from meshwright.layout.config import HybridParallelConfig, Precision
from meshwright.ledger import MemoryKind
from meshwright.models.spec import ModelSpec

OWN_STACK = "meshwright"


def runtime_workload(workload: Workload, config: HybridParallelConfig) -> Workload:
    """The workload as the runtime runs it: fp32 gradients, and AdamW over fp32 masters. Those are the weights
    themselves only where these are fp32 and no gathered copy is kept beside the shards (ZeRO-1 and 2)."""
    shards = config.zero_shards or config.dp * config.cp
    gathered = config.zero in (1, 2) and shards > 1
    alone = config.precision is Precision.FP32 and not gathered
    return replace(
        workload, gradient_bytes=4, optimizer=Optimizer.ADAM_FP32 if alone else Optimizer.ADAM_MIXED, dropout=False
    )


def predicted_memory(
    model: ModelSpec, workload: Workload, config: HybridParallelConfig, stage: int, place: RankPlace | None = None
) -> dict[MemoryKind, int]:
    """Bytes by kind on a rank of a stage, without what a driver or an allocator holds. State is exact for the rank at
    `place`; without one, rows are spread evenly over shards, on the fullest tp rank."""
    candidates = Candidates.from_configs([config])
    roles = every_stage(model, config)
    keys, stack = unit_keys(candidates), stacks()[OWN_STACK]
    own = runtime_workload(workload, config)
    held = held_memory(model, own, _as_reduced(candidates, config), roles, keys, stack)
    if written_down(model):
        del held[MemoryKind.BUFFERS]  # of FSDP2: among what is in flight
    found: dict[MemoryKind, int] = {}
    for terms in (held, _in_flight(model, own, candidates, roles, keys, stack)):
        for kind, nbytes in terms.items():
            here = float(np.broadcast_to(nbytes, roles.index.shape)[0, stage])
            found[kind] = found.get(kind, 0) + round(here)
    if place is not None:
        for kind, nbytes in uneven_state(model, own, config, stage, place).items():
            found[kind] = found.get(kind, 0) + nbytes
    return {kind: nbytes for kind, nbytes in found.items() if nbytes}


def predicted_peak(model: ModelSpec, workload: Workload, config: HybridParallelConfig) -> int:
    """Bytes on the fullest stage, without what a driver or an allocator holds."""
    return max(sum(predicted_memory(model, workload, config, stage).values()) for stage in range(config.pp))


def _as_reduced(candidates: Candidates, config: HybridParallelConfig) -> Candidates:
    """The ZeRO stage whose state the runtime holds: none where there is nobody to shard with. Where a step is one
    microbatch ZeRO-1 reduces gradients as they are made, and never holds them whole: that of ZeRO-2."""
    if (config.zero_shards or config.dp * config.cp) == 1:
        return replace(candidates, zero=np.zeros_like(candidates.zero))
    if config.zero == 1 and config.num_microbatches == 1:
        return replace(candidates, zero=np.full_like(candidates.zero, 2))
    return candidates


def _in_flight(
    model: ModelSpec, workload: Workload, candidates: Candidates, roles: Stages, keys: UnitKeys, stack: Stack
) -> dict[MemoryKind, FloatArray]:
    if written_down(model):
        return program_memory(model, workload, candidates, roles)
    return live_memory(model, workload, candidates, roles, keys, stack, in_flight(candidates, roles))
