"""The guide's three strategies: when memory is short, when throughput counts, when latency counts.

In: the guide's parameters; what it leaves open (the model behind a depth, the GPU) by keyword with stated defaults.
Out: a `Recommendation` or a `ServingChoice`; both unpack as (tp, pp, dp).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from meshwright import hardware
from meshwright.cost.serving import ServingEstimate, serve_estimate
from meshwright.cost.workload import ServingWorkload
from meshwright.errors import InputError
from meshwright.guide.recommend import Recommendation, recommend, whole_nodes
from meshwright.guide.volume import shape_of
from meshwright.layout.config import HybridParallelConfig
from meshwright.layout.rules import divisors
from meshwright.layout.validate import violations
from meshwright.models.shapes import ASPECT, typical_shape
from meshwright.models.spec import ModelSpec
from meshwright.planner.legality import model_facts
from meshwright.planner.objectives import Objective

BYTES_PER_PARAMETER = 2
"""The guide's model sizes are fp16 weights."""
FITS_ONE_B, NEEDS_MANY_B = 8.0, 70.0
"""Models that stand for 'fits a single GPU' and 'does not' (80 GB, fp16), where none is named."""


def memory_constrained_strategy(
    model_size_gb: float,
    available_memory_gb: float,
    num_gpus: int,
    *,
    gpu_interconnect: str = "nvlink",
    seq_length: int = 2048,
    global_batch: int | None = None,
) -> Recommendation:
    """The split that leaves most memory free and keeps 90 % of the best speed, for a model of `model_size_gb` of fp16
    weights that is trained."""
    model = typical_shape(model_size_gb / BYTES_PER_PARAMETER)
    return recommend(
        model, num_gpus, available_memory_gb, gpu_interconnect, seq_length, global_batch, objective=Objective.MEMORY
    )


def throughput_optimized_strategy(
    num_gpus: int,
    interconnect_type: str,
    model_depth: int,
    *,
    model_params_b: float | None = None,
    gpu_memory_gb: float = 80,
    seq_length: int = 2048,
    global_batch: int | None = None,
) -> Recommendation:
    """The fastest training split of a model of that depth, as wide as models of that depth usually are."""
    if model_params_b is None:
        width = max(512, round(ASPECT * model_depth / 512) * 512)
        model = shape_of(width, model_depth, None)
    else:
        model = typical_shape(model_params_b, layers=model_depth)
    return recommend(model, num_gpus, gpu_memory_gb, interconnect_type, seq_length, global_batch)


@dataclass(frozen=True)
class ServingChoice:
    """The split with the shortest time per generated token for one request at a time. Unpacks as `tp, pp, dp`."""

    model: ModelSpec
    best: ServingEstimate
    tried: tuple[ServingEstimate, ...]

    def __iter__(self) -> Iterator[int]:
        config = self.best.config
        return iter((config.tp, config.pp, config.dp))


def latency_optimized_strategy(
    num_gpus: int,
    model_fits_single_gpu: bool,
    *,
    model_params_b: float | None = None,
    gpu_memory_gb: float = 80,
    interconnect_type: str = "nvlink",
    prompt: int = 1024,
    output: int = 256,
) -> ServingChoice:
    """The tp of least latency among those that divide the heads and stay inside the fast domain; GPUs that are left
    over serve further replicas. Models too large for one domain get pipeline stages."""
    model = typical_shape(model_params_b or (FITS_ONE_B if model_fits_single_gpu else NEEDS_MANY_B))
    cluster = hardware.custom(gpu_memory_gb, interconnect_type, whole_nodes(num_gpus))
    workload = ServingWorkload(prompt=prompt, output=output)
    tried: list[ServingEstimate] = []
    for pp in divisors(cluster.gpus):
        for tp in divisors(min(cluster.domain, cluster.gpus)):
            replicas = cluster.gpus // (tp * pp)
            config = HybridParallelConfig(dp=max(replicas, 1), tp=tp, pp=pp)
            if replicas and not violations(config, model_facts(model)):
                tried.append(serve_estimate(model, cluster, workload, config, batch=1))
        if any(one.fits for one in tried):
            break
    fitting = [one for one in tried if one.fits]
    if not fitting:
        raise InputError(f"{model.name} does not fit {num_gpus} GPUs of {gpu_memory_gb:g} GB; give more GPUs")
    best = min(fitting, key=lambda one: (one.tpot_s, one.ttft_s))
    return ServingChoice(model, best, tuple(tried))
