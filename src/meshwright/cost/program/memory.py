"""What the runtime holds beside its state, at the fullest moment of every stage of every candidate.

In: model, workload, candidates, stages. Out: bytes [n, S] by kind at that moment: activations of the microbatches in
flight, buffers (messages, what split backward passes and reductions leave), and what the action at work adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from meshwright.cost.candidates import Candidates, FloatArray
from meshwright.cost.program.chunk import Chunk, ChunkMemory, chunk_memory, layers_of
from meshwright.cost.program.layer import Model, written_down
from meshwright.cost.program.moments import Moment, moments, settled
from meshwright.cost.program.sharding import Sharding, Turn
from meshwright.cost.program.work import FP32, Work
from meshwright.cost.stages import Stages
from meshwright.cost.workload import Workload
from meshwright.layout.config import ContextVariant, HybridParallelConfig, Precision, Recompute, Schedule
from meshwright.layout.split import layer_ranges
from meshwright.ledger import MemoryKind
from meshwright.models.spec import ModelSpec
from meshwright.schedules.actions import ActionKind
from meshwright.schedules.placement import chunks_of_stage, is_v_shaped

__all__ = ["program_memory", "written_down"]

SHOWN = (MemoryKind.ACTIVATIONS, MemoryKind.BUFFERS, MemoryKind.TEMPORARIES)


def program_memory(
    spec: ModelSpec, workload: Workload, candidates: Candidates, stages: Stages
) -> dict[MemoryKind, FloatArray]:
    """Bytes by kind [n, S]; padding repeats the role before it."""
    model = _model(spec)
    found = {kind: np.zeros(stages.index.shape) for kind in SHOWN}
    for row in range(len(candidates)):
        config = candidates.config(row)
        for role, stage in enumerate(stages.index[row].tolist()):
            here = stage_memory(model, config, workload.seq, stage)
            for kind, nbytes in here.items():
                found[kind][row, role] = nbytes
    return found


@lru_cache(maxsize=32)
def _model(spec: ModelSpec) -> Model:
    """One per model, so that what is remembered of its chunks is found by identity."""
    return Model(spec)


@dataclass(frozen=True)
class StageProgram:
    """The chunks of a stage and how they are run."""

    model: Model
    chunks: tuple[Chunk, ...]
    work: Work
    sharding: Sharding
    selective: bool

    def of(self, chunk: int, turn: Turn, split: bool) -> ChunkMemory:
        sharding = self.sharding if not self.sharding.zero else self.sharding.at(turn)
        return chunk_memory(self.model, self.chunks[chunk], self.work, sharding, self.selective, split)


def stage_memory(model: Model, config: HybridParallelConfig, seq: int, stage: int) -> dict[MemoryKind, float]:
    """The fullest moment of one stage."""
    program = stage_program(model, config, seq, stage)
    microbatches = config.num_microbatches
    few = settled(config.schedule, config.pp, microbatches)
    if config.schedule is Schedule.GPIPE and few > 3 + config.pp:
        # every microbatch more is held beside the others
        fewer = [fullest(program, config, stage, m) for m in (2 + config.pp, 3 + config.pp)]
        more = few - 3 - config.pp
        return {kind: last + more * (last - fewer[0][kind]) for kind, last in fewer[1].items()}
    return fullest(program, config, stage, few)


def fullest(
    program: StageProgram, config: HybridParallelConfig, stage: int, microbatches: int
) -> dict[MemoryKind, float]:
    every = moments(config.schedule, config.pp, microbatches, config.vpp, stage)
    splits = any(m.split for m in every)
    found = [_bytes(program, moment, splits) for moment in every]
    return max(found, key=lambda kinds: sum(kinds.values()))


def _bytes(program: StageProgram, moment: Moment, splits: bool) -> dict[MemoryKind, float]:
    usual = [program.of(c, Turn.MIDDLE, splits) for c in range(len(program.chunks))]
    now = program.of(moment.chunk, moment.turn, moment.split)
    peak = {
        ActionKind.FORWARD: now.forward_peak,
        ActionKind.BACKWARD: now.backward_peak,
        ActionKind.BACKWARD_INPUT: now.backward_peak,
        ActionKind.BACKWARD_WEIGHT: now.weights_peak,
    }[moment.kind]
    buffers = (moment.buffers + moment.gradients) * program.work.stream
    for chunk, left, retained in zip(usual, moment.left, moment.retained, strict=True):
        buffers += left * chunk.left + retained * chunk.retained
    return {
        MemoryKind.ACTIVATIONS: sum(n * chunk.kept for n, chunk in zip(moment.held, usual, strict=True)),
        MemoryKind.BUFFERS: buffers,
        MemoryKind.TEMPORARIES: peak,
    }


def stage_program(model: Model, config: HybridParallelConfig, seq: int, stage: int) -> StageProgram:
    """What a stage runs under a configuration."""
    ranges = layer_ranges(config, model.spec.num_layers)
    full = config.recompute_every if config.recompute is Recompute.FULL else None
    own = chunks_of_stage(stage, config.pp, config.vpp, is_v_shaped(config.schedule))
    chunks = tuple(Chunk(layers_of(model.spec.pattern, ranges[c], full), c == 0, c == len(ranges) - 1) for c in own)
    work = Work(
        batch=config.micro_batch,
        seq=seq,
        hidden=model.spec.hidden,
        element=FP32 if config.precision is Precision.FP32 else 2.0,
        tp=config.tp,
        sequence_parallel=config.sequence_parallel,
        cp=config.cp,
        exchanged=config.cp_variant is ContextVariant.ALL_TO_ALL,
        ep=config.ep,
        expert_tp=config.expert_tp,
    )
    return StageProgram(model, chunks, work, _sharding(config), config.recompute is Recompute.SELECTIVE)


def _sharding(config: HybridParallelConfig) -> Sharding:
    """As the runtime cuts state: experts have as many copies as the rest, unless that leaves each on one rank."""
    shards = config.zero_shards or config.dp * config.cp
    if config.zero == 0 or shards == 1:
        return Sharding()
    copies = config.dp * config.cp // shards
    ranks = config.dp * config.cp * config.tp // (config.ep * config.expert_tp)
    return Sharding(config.zero, shards, ranks // copies if ranks > copies else ranks)
