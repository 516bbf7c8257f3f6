"""One line of the traffic ledger over many candidates, and the scene that the lines are worked out from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.candidates import Candidates, FloatArray, IntArray, UnitKeys
from meshwright.cost.layers import element_bytes
from meshwright.cost.stages import Stages
from meshwright.cost.workload import Workload
from meshwright.ledger import Collective, Phase
from meshwright.models.spec import ModelSpec


@dataclass(frozen=True)
class TrafficTerm:
    """Calls of one collective per rank and step: `group_size` and `rank_stride` [n], `calls` and `bytes_per_call`
    [n, S]. The stride is that of the group's members in the default rank order; for groups that a pipeline cuts into
    runs it is the even stride with as many members per domain (never more than there are)."""

    axis: str
    collective: Collective
    phase: Phase
    what: str
    group_size: IntArray
    rank_stride: IntArray
    calls: FloatArray
    bytes_per_call: FloatArray

    @property
    def used(self) -> bool:
        """Whether any candidate makes a call."""
        return bool(((self.group_size > 1)[:, None] & (self.calls > 0)).any())


@dataclass(frozen=True)
class RankPlace:
    """Which rank of its stage: its tp rank, and its place among the dp x cp ranks that share sharded state."""

    tp: int = 0
    shard: int = 0


@dataclass(frozen=True)
class Scene:
    """What the terms are worked out from. `place`: count rows as that rank holds and pads them (None: spread evenly,
    which is all that a search needs). `tokens` on a rank per microbatch, `hidden_bytes` of one hidden state of them
    before any sequence split, `element` bytes of an activation, `microbatches` per step, as float [n]."""

    model: ModelSpec
    workload: Workload
    candidates: Candidates
    stages: Stages
    keys: UnitKeys
    tokens: FloatArray
    hidden_bytes: FloatArray
    element: float
    microbatches: FloatArray
    place: RankPlace | None = None

    def term(
        self,
        axis: str,
        collective: Collective,
        phase: Phase,
        what: str,
        group_size: IntArray,
        rank_stride: IntArray,
        calls: FloatArray | IntArray,
        bytes_per_call: FloatArray,
    ) -> TrafficTerm:
        """A term; `calls` [n, S] or [n, 1], bytes [n] or [n, S]. Groups of one make no calls."""
        shape = self.stages.index.shape
        nbytes = bytes_per_call[:, None] if bytes_per_call.ndim == 1 else bytes_per_call
        counted = np.where((group_size > 1)[:, None], calls, 0.0)
        return TrafficTerm(
            axis,
            collective,
            phase,
            what,
            group_size,
            rank_stride,
            np.broadcast_to(counted, shape),
            np.broadcast_to(nbytes, shape),
        )

    def layers_where(self, counts: list[float]) -> FloatArray:
        """Sum over a stage's layers of a number per layer kind [n, S]."""
        return self.stages.layers @ np.array(counts, dtype=np.float64)


def scene(
    model: ModelSpec,
    workload: Workload,
    candidates: Candidates,
    stages: Stages,
    keys: UnitKeys,
    place: RankPlace | None = None,
) -> Scene:
    element = element_bytes(candidates.precision)
    tokens = candidates.micro_batch * (workload.seq / candidates.cp)
    return Scene(
        model=model,
        workload=workload,
        candidates=candidates,
        stages=stages,
        keys=keys,
        tokens=tokens,
        hidden_bytes=tokens * (model.hidden * element),
        element=element,
        microbatches=candidates.microbatches.astype(np.float64),
        place=place,
    )
