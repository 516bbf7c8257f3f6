"""Prefill and decode on GPUs of their own: what a replica does that only reads prompts, or only writes tokens.

In: an `Engine` of candidates, the workload. Out: arrays [n] per replica. A reading replica is a queue of passes of
whole prompts (Zhong et al. 2024, "DistServe", section 3.1: M/D/1); a writing one decodes as many sequences as its
memory and the target on the time per token allow, undisturbed by prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from meshwright.cost.candidates import BoolArray, FloatArray
from meshwright.cost.serving_memory import serving_memory
from meshwright.cost.serving_pass import Batch, Engine, host_seconds, pass_seconds
from meshwright.cost.workload import ServingWorkload

BISECTIONS = 14


@dataclass(frozen=True)
class ReadingReplicas:
    """Arrays [n]: `prompts` that are read together, seconds from their start to the last stage's end, seconds between
    two such starts, whether weights and the prompts under way fit."""

    prompts: FloatArray
    reading_s: FloatArray
    beat_s: FloatArray
    weights_bytes: FloatArray
    fits: BoolArray


@dataclass(frozen=True)
class WritingReplicas:
    """Arrays [n]: sequences at once (at most `max_sequences`), seconds per token of each, output tokens/s."""

    sequences: FloatArray
    max_sequences: FloatArray
    tpot_s: FloatArray
    tokens_per_s: FloatArray
    weights_bytes: FloatArray
    fits: BoolArray


def reading_replicas(x: Engine, workload: ServingWorkload, prompts: FloatArray) -> ReadingReplicas:
    """`prompts` at a time [n]; more tokens than a pass holds run as several passes, which a pipeline overlaps."""
    c = x.candidates
    passes = np.maximum(np.ceil(prompts * workload.read_tokens / x.stack.max_tokens), 1.0)
    idle = np.zeros(len(c))
    # tokens found in the cache are not computed; the others still see them (as in `cost.serving_rates.prefill_seconds`)
    length = np.full(len(c), workload.prompt * (1.0 + workload.prefix_hit_rate))
    batch = Batch(prompts * workload.read_tokens / passes, length, idle, np.ones(len(c)), prompts / passes)
    per_stage = pass_seconds(x, batch)
    slowest = per_stage.max(axis=1)
    beat = slowest + host_seconds(x, batch.logits, slowest)
    reading = (x.stages.weight * per_stage).sum(axis=1) - slowest + passes * beat
    memory = serving_memory(x, replace(workload, output=1))
    under_way = prompts * (c.pp + 1)  # being read on every stage, and one batch waiting to be fetched
    return ReadingReplicas(
        prompts, reading, passes * beat, memory.weights.max(axis=1), memory.max_sequences >= under_way
    )


def writing_replicas(x: Engine, workload: ServingWorkload) -> WritingReplicas:
    """As many sequences as memory and the target on the time per token allow."""
    memory = serving_memory(x, workload)
    most = np.maximum(np.minimum(memory.max_sequences, x.stack.max_sequences * x.candidates.pp), 1.0)
    sequences = most
    if workload.tpot_s is not None:
        low, high = np.ones(len(x.candidates)), most.copy()
        for _ in range(BISECTIONS):  # the time per token grows with the batch
            middle = np.floor((low + high + 1.0) / 2.0)
            good = decoding_seconds(x, workload, middle) <= workload.tpot_s
            low, high = np.where(good, middle, low), np.where(good, high, np.maximum(middle - 1.0, low))
        sequences = low
    tpot = decoding_seconds(x, workload, sequences)
    fits = (memory.max_sequences >= 1.0) & (tpot <= (workload.tpot_s or np.inf))
    rate = sequences / tpot * x.stack.occupancy
    return WritingReplicas(sequences, memory.max_sequences, tpot, rate, memory.weights.max(axis=1), fits)


def decoding_seconds(x: Engine, workload: ServingWorkload, sequences: FloatArray) -> FloatArray:
    """Seconds per token of `sequences` that decode together, a slice of them on each stage."""
    pp = x.candidates.pp.astype(np.float64)
    one = np.ones(len(pp))
    decoding = sequences / np.minimum(pp, sequences)
    per_stage = pass_seconds(
        x, Batch(0.0 * one, one, decoding, one * (workload.prompt + workload.output / 2.0), decoding)
    )
    slowest = per_stage.max(axis=1)
    return (slowest + host_seconds(x, decoding, slowest)) * pp


def queue_seconds(beat_s: FloatArray, busy: FloatArray) -> FloatArray:
    """Mean wait before a server with constant service time and Poisson arrivals: R D^2 / (2 (1 - R D)) with R D the
    share of time it is busy (DistServe, equation 1; Pollaczek and Khinchine)."""
    return beat_s * busy / (2.0 * (1.0 - busy))


def busy_share(beat_s: FloatArray, wait_s: FloatArray) -> FloatArray:
    """The largest busy share whose mean wait is `wait_s` (`queue_seconds` solved for it); 0 where that is negative."""
    waits = np.maximum(wait_s, 0.0) / beat_s
    return 2.0 * waits / (1.0 + 2.0 * waits)


__all__ = ["ReadingReplicas", "WritingReplicas", "busy_share", "decoding_seconds", "queue_seconds", "reading_replicas",
           "writing_replicas"]  # fmt: skip
