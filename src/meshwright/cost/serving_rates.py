"""How fast a replica serves: prompts read, tokens decoded, a static batch, saturation with continuous batching.

In: `Engine`, `Requests` and the sequences at once, arrays [n]. Out: seconds or output tokens/s of a replica [n].
Saturation: Yu et al. 2022, "Orca"; prompts are chunked into the same passes (Agrawal et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.candidates import FloatArray
from meshwright.cost.serving_pass import Batch, Engine, host_seconds, pass_seconds
from meshwright.cost.workload import ServingWorkload


@dataclass(frozen=True)
class Requests:
    """What is asked, per candidate: tokens of a prompt (of which the share `hit_rate` is cached already) and of its
    answer, and how many requests there are in all (inf: without end)."""

    prompt: FloatArray
    output: FloatArray
    hit_rate: FloatArray
    count: FloatArray

    @classmethod
    def of(cls, workload: ServingWorkload, n: int) -> Requests:
        """One workload for `n` candidates."""
        count = np.inf if workload.requests is None else float(workload.requests)
        values = (float(workload.prompt), float(workload.output), workload.prefix_hit_rate, count)
        return cls(*(np.full(n, value) for value in values))

    @property
    def computed(self) -> FloatArray:
        """Prompt tokens that are computed. They still see the cached ones, as if of a prompt so much longer."""
        return self.prompt * (1.0 - self.hit_rate)

    @property
    def seen(self) -> FloatArray:
        return self.prompt * (1.0 + self.hit_rate)

    @property
    def context(self) -> FloatArray:
        """Cached tokens of a sequence in the middle of its answer."""
        return self.prompt + self.output / 2.0


def prefill_seconds(x: Engine, prompts: FloatArray, asked: Requests) -> FloatArray:
    """Reading `prompts` prompts on one replica until the last stage is done. More tokens than a pass holds run as
    several passes; a pipeline overlaps them, and may cut finer to do so."""
    c = x.candidates
    tokens = prompts * asked.computed
    fewest = np.maximum(np.ceil(tokens / x.stack.max_tokens), 1.0)
    idle = np.zeros(len(c))

    def cut(pieces: FloatArray) -> FloatArray:
        batch = Batch(tokens / pieces, asked.seen, idle, np.ones(len(c)), prompts / pieces)
        return _pipelined(x, batch, pieces)

    return np.minimum(cut(fewest), cut(np.maximum(fewest, c.pp)))


def decode_step(x: Engine, sequences: FloatArray, context: FloatArray) -> FloatArray:
    """Seconds until each of `sequences` has its next token: the batch as a whole, or in a slice per stage."""
    one = np.ones(len(x.candidates))

    def cut(pieces: FloatArray) -> FloatArray:
        return _pipelined(x, Batch(0.0 * one, one, sequences / pieces, context, sequences / pieces), pieces)

    return np.minimum(cut(one), cut(np.minimum(x.candidates.pp, np.maximum(sequences, 1.0))))


def _pipelined(x: Engine, batch: Batch, pieces: FloatArray) -> FloatArray:
    """Seconds of `pieces` equal passes through all stages: the first one's way, and a beat for each further one."""
    per_stage = pass_seconds(x, batch)
    host = host_seconds(x, batch.logits, per_stage.max(axis=1))
    return (x.stages.weight * per_stage).sum(axis=1) + (pieces - 1.0) * per_stage.max(axis=1) + pieces * host


def static_batch_seconds(x: Engine, asked: Requests, sequences: FloatArray) -> FloatArray:
    """Prefill of the whole batch, which yields the first token, then one decode step per further token at the mean
    context."""
    steps = np.maximum(asked.output - 1.0, 0.0)
    return prefill_seconds(x, sequences, asked) + steps * decode_step(x, sequences, asked.context)


def token_seconds(x: Engine, asked: Requests, sequences: FloatArray) -> FloatArray:
    """Seconds between two tokens of a sequence on a replica that keeps `sequences` in flight. Every pass decodes a
    pipeline slice of them and reads the share of prompts that keeps the number constant: prompt / output tokens per
    decoded token. A pass holds `max_tokens`; a heavier mix runs as more passes."""
    pp = x.candidates.pp.astype(np.float64)
    decoding = sequences / np.minimum(pp, np.maximum(sequences, 1.0))
    read = decoding * asked.computed / asked.output
    logits = decoding * (1.0 + 1.0 / asked.output)
    per_stage = pass_seconds(x, Batch(read, np.maximum(asked.seen, 1.0), decoding, asked.context, logits))
    slowest = per_stage.max(axis=1)
    # a token passes every stage; with fewer sequences than stages some of them idle
    return (slowest + host_seconds(x, decoding, slowest)) * pp


def first_token_seconds(x: Engine, asked: Requests, sequences: FloatArray, tpot: FloatArray) -> FloatArray:
    """A new prompt waits for the pass under way, half of one on average, none on an idle engine; then it is read."""
    reading = prefill_seconds(x, np.minimum(sequences, 1.0), asked)
    return reading + tpot / 2.0 * (1.0 - 1.0 / np.maximum(sequences, 1.0))


def output_rate(x: Engine, asked: Requests, sequences: FloatArray, tpot: FloatArray) -> FloatArray:
    """Output tokens/s at saturation. Requests of one length that are all sent at once also end together, wave after
    wave; after the full waves one is left of as many as remain, with the rest of the engine idle."""
    finite = np.isfinite(asked.count)
    if not finite.any():
        return sequences / tpot * x.stack.occupancy
    count = np.where(finite, asked.count / x.candidates.dp, sequences)
    waves = np.floor(count / sequences + 1e-9)
    rest = np.maximum(count - waves * sequences, 0.0)
    last = np.where(rest > 0, token_seconds(x, asked, np.maximum(rest, 1.0)), 0.0)
    return count / (waves * tpot + last) * x.stack.occupancy
