"""What a rank's state holds beyond its even share of every tensor, under this project's runtime.

FSDP2 cuts a tensor in chunks of ceil(rows / shards) and pads the last ones: what it stores, gathers and reduces has
that size on every rank, AdamW's moments only the rank's own rows. A vocabulary that tp does not divide leaves the last
tp ranks with fewer rows. In: a rank's stage and place. Out: bytes by kind (negative: less than an even share).
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.cost.candidates import Candidates, unit_keys
from meshwright.cost.memory import MASTER_BYTES, OPTIMIZER_BYTES
from meshwright.cost.stages import every_stage
from meshwright.cost.traffic_elements import Count, end_elements, gathered, held_dense, owned
from meshwright.cost.traffic_term import RankPlace, Scene, scene
from meshwright.cost.workload import Optimizer, Workload
from meshwright.layout.config import HybridParallelConfig
from meshwright.ledger import MemoryKind
from meshwright.models.spec import ModelSpec

MOMENT_BYTES = OPTIMIZER_BYTES[Optimizer.ADAM_FP32]


@dataclass(frozen=True)
class DenseElements:
    """Elements of all dense tensors of a rank: whole, as FSDP2 gathers them, and the rows of its own shard."""

    held: float
    gathered: float
    owned: float


def uneven_state(
    model: ModelSpec, workload: Workload, config: HybridParallelConfig, stage: int, place: RankPlace
) -> dict[MemoryKind, int]:
    """Bytes by kind, experts aside. `workload` as the runtime runs it (`own_runtime.runtime_workload`)."""
    candidates = Candidates.from_configs([config])
    stages, keys = every_stage(model, config), unit_keys(candidates)
    here, even = (scene(model, workload, candidates, stages, keys, where) for where in (place, None))
    exact, spread = (_state(x, workload, config, _dense_elements(x, stage)) for x in (here, even))
    return {kind: round(exact[kind] - spread[kind]) for kind in exact}


def _state(x: Scene, workload: Workload, config: HybridParallelConfig, dense: DenseElements) -> dict[MemoryKind, float]:
    shards = config.zero_shards or config.dp * config.cp
    optimizer = OPTIMIZER_BYTES[workload.optimizer]
    if config.zero == 0 or shards == 1:
        parameters, gradients, state = x.element * dense.held, dense.held, optimizer * dense.held
    else:
        stored = dense.gathered / shards
        moments = MOMENT_BYTES * dense.owned
        # ZeRO-1 holds gradients whole until the last microbatch; a single one is reduced at once
        whole = config.zero == 1 and config.num_microbatches > 1
        gradients = dense.held if whole else stored
        if config.zero == 3:  # the fp32 shard is parameter and master in one
            parameters, state = MASTER_BYTES * stored, moments
        else:
            parameters, state = x.element * dense.gathered, MASTER_BYTES * stored + moments
    gradients = workload.gradient_bytes * gradients
    return {
        MemoryKind.PARAMETERS: parameters,
        MemoryKind.GRADIENTS: gradients,
        MemoryKind.OPTIMIZER: state,
    }


def _dense_elements(x: Scene, stage: int) -> DenseElements:
    return DenseElements(*(_over_stage(x, stage, count) for count in (held_dense, gathered, owned)))


def _over_stage(x: Scene, stage: int, count: Count) -> float:
    """Of every dense tensor of the only candidate's stage."""
    apart = (x.candidates.pp * x.candidates.vpp > 1)[:, None]
    per_layer = [float(count(kind.tensors, x)[0]) for kind in x.model.kinds]
    return float(x.layers_where(per_layer)[0, stage] + end_elements(x, count, apart)[0, stage])
