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
from meshwright.cost.serving_pass import Batch, Engine, engine, host_seconds, pass_seconds
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
    running = np.minimum(capacity, x.stack.max_sequences * candidates.pp) if batch is None else batch
    sequences = np.maximum(running, 1.0)
    if batch is None:
        sequences = _within_targets(x, workload, sequences)
    ttft, tpot, rate = _saturated(x, workload, sequences)
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
        latency_s=static_batch_seconds(x, workload, sequences),
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


def prefill_seconds(x: Engine, prompts: FloatArray, length: float, hit_rate: float = 0.0) -> FloatArray:
    """Reading `prompts` prompts of `length` tokens on one replica until the last stage is done [n]. More tokens than a
    pass holds run as several passes; a pipeline overlaps them, and may cut finer to do so. Tokens found in the cache
    (`hit_rate`) are not computed; the others still see them, as if of a prompt so much longer."""
    c = x.candidates
    seen, length = length * (1.0 + hit_rate), length * (1.0 - hit_rate)
    fewest = np.maximum(np.ceil(prompts * length / x.stack.max_tokens), 1.0)
    size = np.full(len(c), seen)
    idle = np.zeros(len(c))

    def cut(pieces: FloatArray) -> FloatArray:
        batch = Batch(prompts * length / pieces, size, idle, np.ones(len(c)), prompts / pieces)
        return _pipelined(x, batch, pieces)

    return np.minimum(cut(fewest), cut(np.maximum(fewest, c.pp)))


def decode_step(x: Engine, sequences: FloatArray, context: FloatArray) -> FloatArray:
    """Seconds until each of `sequences` has its next token [n]: the batch as a whole, or in a slice per stage."""
    one = np.ones(len(x.candidates))

    def cut(pieces: FloatArray) -> FloatArray:
        return _pipelined(x, Batch(0.0 * one, one, sequences / pieces, context, sequences / pieces), pieces)

    return np.minimum(cut(one), cut(np.minimum(x.candidates.pp, np.maximum(sequences, 1.0))))


def _pipelined(x: Engine, batch: Batch, pieces: FloatArray) -> FloatArray:
    """Seconds of `pieces` equal passes through all stages: the first one's way, and a beat for each further one."""
    per_stage = pass_seconds(x, batch)
    host = host_seconds(x, batch.logits, per_stage.max(axis=1))
    return (x.stages.weight * per_stage).sum(axis=1) + (pieces - 1.0) * per_stage.max(axis=1) + pieces * host


def static_batch_seconds(x: Engine, workload: ServingWorkload, sequences: FloatArray) -> FloatArray:
    """Prefill of the whole batch, which yields the first token, then one decode step per further token at the mean
    context."""
    context = np.full(len(x.candidates), workload.prompt + workload.output / 2.0)
    steps = max(workload.output - 1, 0)
    return prefill_seconds(x, sequences, float(workload.prompt), workload.prefix_hit_rate) + steps * decode_step(
        x, sequences, context
    )


def _saturated(
    x: Engine, workload: ServingWorkload, sequences: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """TTFT, time per output token and output tokens/s of a replica that keeps `sequences` in flight. Every pass decodes
    a pipeline slice of them and reads the share of prompts that keeps the number constant: prompt / output tokens per
    decoded token. A pass holds `max_tokens`; a heavier mix runs as more passes."""
    pp = x.candidates.pp.astype(np.float64)
    decoding = sequences / np.minimum(pp, sequences)
    prompt_tokens = decoding * workload.read_tokens / workload.output
    context = np.full(len(x.candidates), workload.prompt + workload.output / 2.0)
    length = np.full(len(x.candidates), max(workload.prompt, 1) * (1.0 + workload.prefix_hit_rate))
    logits = decoding * (1.0 + 1.0 / workload.output)
    per_stage = pass_seconds(x, Batch(prompt_tokens, length, decoding, context, logits))
    slowest = per_stage.max(axis=1)
    beat = slowest + host_seconds(x, decoding, slowest)
    # a token passes every stage; with fewer sequences than stages some of them idle
    tpot = beat * pp
    rate = sequences / tpot
    one = np.minimum(sequences, 1.0)
    # a new prompt waits for the pass under way: half of one on average, none on an idle engine
    reading = prefill_seconds(x, one, float(workload.prompt), workload.prefix_hit_rate)
    ttft = reading + tpot / 2.0 * (1.0 - 1.0 / np.maximum(sequences, 1.0))
    return ttft, tpot, rate * x.stack.occupancy


def _within_targets(x: Engine, workload: ServingWorkload, most: FloatArray) -> FloatArray:
    """The most sequences whose time per token keeps the target, by bisection (it grows with the batch)."""
    if workload.tpot_s is None:
        return most
    low, high = np.ones(len(x.candidates)), most.copy()
    for _ in range(14):
        middle = np.floor((low + high + 1.0) / 2.0)
        good = _saturated(x, workload, middle)[1] <= workload.tpot_s
        low, high = np.where(good, middle, low), np.where(good, high, np.maximum(middle - 1.0, low))
    return low


__all__ = [
    "ServingArrays",
    "ServingEstimate",
    "serve_arrays",
    "serve_estimate",
    "serving_engine",
    "static_batch_seconds",
]
