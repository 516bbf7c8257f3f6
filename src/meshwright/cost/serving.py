"""Serving: what fits beside the weights, and how fast prompts are read and tokens come, per parallel configuration.

In: model, cluster, `ServingWorkload`, candidates (dp replicas of tp x pp, experts over ep), the engine's traits, and
the sequences per replica (None: as many as the cache and the latency targets allow). Out: `ServingArrays` [n], or a
`ServingEstimate` of one configuration. Two regimes: a static batch (prefill, then `output` decode steps) and saturation
with continuous batching (Yu et al. 2022, "Orca"; prompts are chunked into the same passes, Agrawal et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from meshwright.cost.candidates import BoolArray, Candidates, FloatArray
from meshwright.cost.device import device_for, network
from meshwright.cost.serving_memory import serving_memory
from meshwright.cost.serving_pass import Engine, engine
from meshwright.cost.serving_rates import (
    Requests,
    first_token_seconds,
    output_rate,
    static_batch_seconds,
    token_seconds,
)
from meshwright.cost.serving_stack import ServingStack, serving_stacks
from meshwright.cost.stages import stages
from meshwright.cost.workload import ServingWorkload
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import HybridParallelConfig
from meshwright.models.spec import ModelSpec


@dataclass(frozen=True)
class ServingArrays:
    """Arrays [n]. Memory is that of the fullest stage's rank. `sequences` run at once on one replica; rates are of all
    replicas together. `latency_s` is that of one static batch of `sequences`."""

    weights_bytes: FloatArray
    workspace_bytes: FloatArray
    cache_bytes_per_sequence: FloatArray
    max_sequences: FloatArray
    sequences: FloatArray
    ttft_s: FloatArray
    tpot_s: FloatArray
    latency_s: FloatArray
    tokens_per_s: FloatArray
    tokens_per_s_per_gpu: FloatArray
    fits: BoolArray
    meets_targets: BoolArray


@dataclass(frozen=True)
class ServingEstimate:
    """One configuration's row of `ServingArrays`, in plain numbers."""

    config: HybridParallelConfig
    weights_bytes: float
    workspace_bytes: float
    cache_bytes_per_sequence: float
    max_sequences: int
    sequences: int
    ttft_s: float
    tpot_s: float
    latency_s: float
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    fits: bool
    meets_targets: bool


def serve_estimate(
    model: ModelSpec,
    cluster: Cluster,
    workload: ServingWorkload,
    config: HybridParallelConfig,
    batch: int | None = None,
    stack: ServingStack | None = None,
    weight_bytes: float | None = None,
) -> ServingEstimate:
    """All of one configuration. `batch` sequences per replica; `weight_bytes` per element for weight-only formats."""
    candidates = Candidates.from_configs([config])
    wanted = None if batch is None else np.array([float(batch)])
    arrays = serve_arrays(model, cluster, workload, candidates, wanted, stack, weight_bytes)
    row = {f.name: getattr(arrays, f.name)[0].item() for f in fields(arrays)}
    row |= {name: int(row[name]) for name in ("max_sequences", "sequences")}
    return ServingEstimate(config=config, **row)


def serve_arrays(
    model: ModelSpec,
    cluster: Cluster,
    workload: ServingWorkload,
    candidates: Candidates,
    batch: FloatArray | None = None,
    stack: ServingStack | None = None,
    weight_bytes: float | None = None,
) -> ServingArrays:
    """Memory, latency and throughput of every candidate."""
    x = serving_engine(model, cluster, workload, candidates, stack, weight_bytes)
    memory = serving_memory(x, workload)
    capacity = memory.max_sequences
    sequences = np.maximum(batch, 1.0) if batch is not None else _taken(x, workload, capacity)
    if batch is None:
        sequences = _within_targets(x, workload, sequences)
    asked = Requests.of(workload, len(candidates))
    tpot = token_seconds(x, asked, sequences)
    ttft = first_token_seconds(x, asked, sequences, tpot)
    rate = output_rate(x, asked, sequences, tpot)
    fits = capacity >= (1.0 if batch is None else batch)
    gpus = candidates.world.astype(np.float64)
    total = rate * candidates.dp
    targets = (ttft <= (workload.ttft_s or np.inf)) & (tpot <= (workload.tpot_s or np.inf))
    return ServingArrays(
        weights_bytes=memory.weights.max(axis=1),
        workspace_bytes=memory.workspace,
        cache_bytes_per_sequence=memory.per_sequence.max(axis=1),
        max_sequences=capacity,
        sequences=sequences,
        ttft_s=ttft,
        tpot_s=tpot,
        latency_s=static_batch_seconds(x, asked, sequences),
        tokens_per_s=total,
        tokens_per_s_per_gpu=total / gpus,
        fits=fits,
        meets_targets=fits & targets,
    )


def serving_engine(
    model: ModelSpec,
    cluster: Cluster,
    workload: ServingWorkload,
    candidates: Candidates,
    stack: ServingStack | None = None,
    weight_bytes: float | None = None,
) -> Engine:
    """What passes of these candidates are priced from."""
    stack = serving_stacks()["vllm"] if stack is None else stack
    if workload.pass_tokens is not None:
        stack = replace(stack, max_tokens=workload.pass_tokens)
    return engine(
        model,
        cluster,
        # the assumed constants: those fitted to training carry its kernels; an engine's traits are relative to these
        device_for(cluster.accelerator.architecture, fitted=False),
        network(fitted=False),
        stack,
        candidates,
        stages(model, candidates),
        workload.kv_bytes_per_element,
        workload.weight_bytes if weight_bytes is None else weight_bytes,
    )


def running_sequences(x: Engine, workload: ServingWorkload) -> FloatArray:
    """Sequences that a replica takes at once where nobody says how many [n]."""
    return _taken(x, workload, serving_memory(x, workload).max_sequences)


def _taken(x: Engine, workload: ServingWorkload, capacity: FloatArray) -> FloatArray:
    """As many as fit, no more than the engine's limit per pass and than there are."""
    asked = np.ceil((workload.requests or np.inf) / x.candidates.dp)
    return np.maximum(np.minimum(np.minimum(capacity, x.stack.max_sequences * x.candidates.pp), asked), 1.0)


def _within_targets(x: Engine, workload: ServingWorkload, most: FloatArray) -> FloatArray:
    """The most sequences whose time per token keeps the target, by bisection (it grows with the batch)."""
    if workload.tpot_s is None:
        return most
    asked = Requests.of(workload, len(x.candidates))
    low, high = np.ones(len(x.candidates)), most.copy()
    for _ in range(14):
        middle = np.floor((low + high + 1.0) / 2.0)
        good = token_seconds(x, asked, middle) <= workload.tpot_s
        low, high = np.where(good, middle, low), np.where(good, high, np.maximum(middle - 1.0, low))
    return low


__all__ = [
    "ServingArrays",
    "ServingEstimate",
    "running_sequences",
    "serve_arrays",
    "serve_estimate",
    "serving_engine",
]
