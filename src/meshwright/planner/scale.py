"""Scaling of a training job: the best plan at each number of GPUs, and the efficiency lost to each axis.

Strong scaling keeps the global batch; weak scaling keeps the sequences per GPU. Efficiencies are speed per GPU relative
to the smallest count that fits; the factors of each plan come from the cost model (`Estimate.efficiency`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from meshwright.cost.estimate import Estimate
from meshwright.cost.stack import Stack, default_stack
from meshwright.cost.workload import Workload
from meshwright.hardware.load import resize
from meshwright.hardware.spec import Cluster
from meshwright.models.spec import ModelSpec
from meshwright.planner.constraints import Constraints
from meshwright.planner.objectives import Objective
from meshwright.planner.search import search


@dataclass(frozen=True)
class ScalingPoint:
    """The best plan on `gpus` devices; `estimate` is None where nothing fits or no configuration is legal.

    `speedup` is tokens/s over the first point's that fits, `efficiency` that speedup over the ratio of GPUs.
    """

    gpus: int
    global_batch: int
    estimate: Estimate | None
    tokens_per_s: float
    speedup: float
    efficiency: float

    @property
    def factors(self) -> dict[str, float]:
        """Share of the peak left by each of tp, cp, ep, pp, dp, recompute and kernels (their product is the MFU)."""
        return {} if self.estimate is None else self.estimate.efficiency


@dataclass(frozen=True)
class Scaling:
    """Points by rising number of GPUs."""

    weak: bool
    points: tuple[ScalingPoint, ...]

    @property
    def base(self) -> ScalingPoint | None:
        """The point that speedup and efficiency refer to."""
        return next((p for p in self.points if p.estimate is not None), None)


def scaling(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    gpus: Sequence[int],
    global_batch: int,
    weak: bool = False,
    reference_gpus: int | None = None,
    constraints: Constraints | None = None,
    stack: Stack | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scaling:
    """Best plan at every count. Weak scaling holds `global_batch` at `reference_gpus` (the largest count unless given)
    and shrinks it in proportion elsewhere, to at least one sequence."""
    counts = sorted(set(gpus))
    reference = reference_gpus or counts[-1]
    software = stack or default_stack()
    points: list[ScalingPoint] = []
    for done, count in enumerate(counts):
        batch = max(1, global_batch * count // reference) if weak else global_batch
        result = search(
            model, resize(cluster, gpus=count), workload, batch, Objective.THROUGHPUT, 1, constraints, software
        )
        points.append(_point(count, batch, result.best[0] if result.best else None, points))
        if progress is not None:
            progress(done + 1, len(counts))
    return Scaling(weak, tuple(points))


def _point(gpus: int, global_batch: int, estimate: Estimate | None, before: list[ScalingPoint]) -> ScalingPoint:
    if estimate is None:
        return ScalingPoint(gpus, global_batch, None, 0.0, 0.0, 0.0)
    base = next((p for p in before if p.estimate is not None), None)
    speed = estimate.throughput.tokens_per_s
    speedup = speed / base.tokens_per_s if base else 1.0
    efficiency = speedup * base.gpus / gpus if base else 1.0
    return ScalingPoint(gpus, global_batch, estimate, speed, speedup, efficiency)
