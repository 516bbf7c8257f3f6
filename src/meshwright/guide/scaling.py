"""`model_scaling_efficiency`: what share of the speed of single GPUs a tp x pp x dp split keeps.

In: the guide's four numbers, the model and GPU by keyword. Out: a `ScalingEfficiency`, which is a number where one is
wanted (`float(...)`).
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright import hardware
from meshwright.cost.estimate import Estimate
from meshwright.cost.evaluate import estimate
from meshwright.cost.workload import Workload
from meshwright.layout.config import HybridParallelConfig
from meshwright.models.shapes import typical_shape
from meshwright.planner.legality import check


@dataclass(frozen=True)
class ScalingEfficiency:
    """Factors of the cost model: exposed communication and bubble by axis. `overall` is their product; the kernels' own
    share of the peak is not part of it (it is lost on one GPU too)."""

    tp: float
    pp: float
    dp: float
    ideal: int
    estimate: Estimate

    @property
    def overall(self) -> float:
        return self.tp * self.pp * self.dp

    @property
    def actual(self) -> float:
        """How many perfectly used GPUs the job is worth."""
        return self.ideal * self.overall

    def __float__(self) -> float:
        return self.overall


def model_scaling_efficiency(
    tp_size: int,
    pp_size: int,
    dp_size: int,
    num_micro_batches: int,
    *,
    model_params_b: float = 70,
    model_depth: int | None = None,
    seq_length: int = 2048,
    micro_batch_size: int = 1,
    gpu: str = "a100-80gb",
) -> ScalingEfficiency:
    """Efficiency of a training step of a model of that size on that GPU. Whether it fits is another question
    (`.estimate.memory.fits`)."""
    model = typical_shape(model_params_b, layers=model_depth)
    config = HybridParallelConfig(
        dp=dp_size, tp=tp_size, pp=pp_size, micro_batch=micro_batch_size, sequence_parallel=tp_size > 1,
        global_batch=dp_size * micro_batch_size * num_micro_batches, zero=1 if dp_size > 1 else 0,
    )  # fmt: skip
    cluster = hardware.resize(hardware.load(gpu), gpus=config.world_size)
    check(config, model, cluster, seq_length)
    result = estimate(model, cluster, Workload(seq=seq_length), config)
    factors = result.efficiency
    return ScalingEfficiency(factors["tp"], factors["pp"], factors["dp"], config.world_size, result)
