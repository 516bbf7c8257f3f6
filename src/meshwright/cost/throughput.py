"""Rates of a step: tokens per second, model and hardware FLOP/s, utilisation, and the factors it was lost to.

In: model, cluster, workload, candidates, seconds of a step by part. Out: arrays [n], or the `Throughput` of one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from meshwright.cost.candidates import Candidates, FloatArray
from meshwright.cost.device import peak_flops
from meshwright.cost.estimate import Throughput
from meshwright.cost.workload import Workload
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import HybridParallelConfig
from meshwright.models.flops import model_flops_per_token, recompute_flops_per_token
from meshwright.models.spec import ModelSpec

EFFICIENCY_STEPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("kernels", ("forward", "backward", "optimizer", "host")),
    ("recompute", ("recompute",)),
    ("tp", ("tp",)),
    ("cp", ("cp",)),
    ("ep", ("ep",)),
    ("pp", ("pp", "bubble")),
    ("dp", ("dp",)),
)
"""Parts of a step that each efficiency factor accounts for, in the order in which they are added up."""


def tokens_per_step(workload: Workload, candidates: Candidates) -> FloatArray:
    return candidates.global_batch.astype(np.float64) * workload.seq


def tokens_per_s_per_gpu(workload: Workload, candidates: Candidates, step_s: FloatArray) -> FloatArray:
    return tokens_per_step(workload, candidates) / (step_s * candidates.world)


def utilisation(
    model: ModelSpec, cluster: Cluster, workload: Workload, candidates: Candidates, rate: FloatArray
) -> FloatArray:
    """MFU of a rate in tokens/s per GPU, full attention counted (Chowdhery et al. 2022, appendix B)."""
    flops = float(model_flops_per_token(model, workload.seq, "model_full"))
    return rate * flops / peak_flops(cluster.accelerator, candidates.precision)


def throughput(
    model: ModelSpec, cluster: Cluster, workload: Workload, config: HybridParallelConfig, step_s: float
) -> Throughput:
    """All rates of one configuration."""
    tokens = config.global_batch * workload.seq / step_s
    rate = tokens / config.world_size
    peak = peak_flops(cluster.accelerator, config.precision)
    full = float(model_flops_per_token(model, workload.seq, "model_full"))
    causal = float(model_flops_per_token(model, workload.seq, "model_causal"))
    again = recompute_flops_per_token(model, workload.seq, config.recompute, config.recompute_every, causal=False)
    hardware = full + float(again)
    return Throughput(
        tokens_per_s=tokens,
        tokens_per_s_per_gpu=rate,
        model_tflops_per_gpu=rate * full / 1e12,
        hardware_tflops_per_gpu=rate * hardware / 1e12,
        mfu=rate * full / peak,
        mfu_causal=rate * causal / peak,
        hfu=rate * hardware / peak,
    )


def efficiency(parts_s: Mapping[str, float], mfu: float) -> dict[str, float]:
    """Factors whose product is `mfu`: each is the time before its parts are added over the time after. The first starts
    from the step at peak FLOP/s, mfu x step."""
    time = mfu * float(np.sum(list(parts_s.values())))
    factors: dict[str, float] = {}
    total = 0.0
    for name, parts in EFFICIENCY_STEPS:
        total += sum(parts_s[p] for p in parts)
        factors[name] = time / total
        time = total
    return factors
