"""Disaggregated serving: which GPUs read prompts and which write tokens, each pool cut in its own way.

In: model, cluster, requests with their targets. Out: `DisaggregatedResult`: the best pairs of pools by output tokens/s
per GPU of the whole cluster, beside the best aggregated plan, with the reason. A pool is a number of units (a replica;
of mixture-of-experts models the replicas that share experts); the job's rate is what both pools and the link between
them can do (DistServe, section 4.1: the pools' rates are matched).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from meshwright.cost.candidates import BoolArray, Candidates, FloatArray, IntArray
from meshwright.cost.kv_transfer import cache_shares, exposed_seconds, transfer_seconds
from meshwright.cost.serving import ServingEstimate, serving_engine
from meshwright.cost.serving_pools import (
    ReadingReplicas,
    WritingReplicas,
    busy_share,
    queue_seconds,
    reading_replicas,
    writing_replicas,
)
from meshwright.cost.serving_stack import ServingStack, serving_stacks
from meshwright.cost.workload import ServingWorkload
from meshwright.errors import InputError
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import HybridParallelConfig
from meshwright.models.spec import ModelSpec
from meshwright.planner.constraints import Constraints
from meshwright.planner.pool_candidates import pool_candidates
from meshwright.planner.search import SearchCounts
from meshwright.planner.serving import serving_search

ENGINE_OF_ONE_STAGE = "vllm"
"""vLLM 0.32 refuses pipeline stages in an engine that takes caches from others (its NIXL connectors)."""


@dataclass(frozen=True)
class PrefillPool:
    """`config`: of the whole pool, dp replicas in all. `prompts` are read at a time, in `reading_s`; `busy`: share of
    the time."""

    config: HybridParallelConfig
    prompts: int
    reading_s: float
    wait_s: float
    busy: float
    weights_bytes: float


@dataclass(frozen=True)
class DecodePool:
    """`config`: of the whole pool. At most `sequences` at once on each replica; memory holds `max_sequences`."""

    config: HybridParallelConfig
    sequences: int
    max_sequences: int
    tpot_s: float
    weights_bytes: float


@dataclass(frozen=True)
class CacheTransfer:
    """Of one prompt: bytes that leave the prefill pool, seconds on the busiest link, those the first token waits."""

    bytes_per_request: float
    transfer_s: float
    exposed_s: float
    by_layer: bool


@dataclass(frozen=True)
class DisaggregatedPlan:
    """Two pools whose rates match. `ttft_s`: wait, reading, transfer and the decode pool's first step. `limit`: what
    bounds the rate: 'prefill', 'decode', or 'link'."""

    prefill: PrefillPool
    decode: DecodePool
    transfer: CacheTransfer
    requests_per_s: float
    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    idle_gpus: int
    limit: str


@dataclass(frozen=True)
class DisaggregatedResult:
    """`best` may be empty: `sentence` says why. `gain`: of the best over the aggregated plan, where both exist."""

    gpus: int
    best: tuple[DisaggregatedPlan, ...]
    aggregated: ServingEstimate | None
    gain: float | None
    sentence: str
    counts: SearchCounts


def disaggregated_search(
    model: ModelSpec,
    cluster: Cluster,
    workload: ServingWorkload,
    top: int = 10,
    constraints: Constraints | None = None,
    stack: ServingStack | None = None,
    by_layer: bool = False,
) -> DisaggregatedResult:
    """The best `top` pairs of pools on all GPUs of the cluster, beside the best aggregated plan."""
    start = perf_counter()
    fixed, stack = constraints or Constraints(), stack or serving_stacks()["vllm"]
    if cluster.gpus < 2:
        raise InputError("two pools need at least two GPUs; give --gpus 2 or more, or leave --disaggregated out")
    pairs = _Pairs.of(model, cluster, workload, fixed, stack, by_layer)
    best = tuple(pairs.plan(int(i), int(j)) for i, j in pairs.ranked(top))
    aggregated = serving_search(model, cluster, workload, top=1, constraints=fixed, stack=stack).best
    plain = aggregated[0] if aggregated else None
    gain = best[0].tokens_per_s_per_gpu / plain.tokens_per_s_per_gpu if best and plain else None
    counts = SearchCounts(pairs.rate.size, pairs.rate.size, int((pairs.rate > 0).sum()), perf_counter() - start)
    return DisaggregatedResult(cluster.gpus, best, plain, gain, _sentence(best, plain, workload), counts)


@dataclass(frozen=True)
class _Pairs:
    """Every prefill choice [i] with every decode choice [j]; matrices [i, j]."""

    cluster: Cluster
    workload: ServingWorkload
    readers: Candidates
    reading: ReadingReplicas
    writers: Candidates
    writing: WritingReplicas
    cache_bytes: FloatArray
    transfer_s: FloatArray
    exposed_s: FloatArray
    by_layer: bool
    reader_rate: FloatArray  # requests/s of one prefill unit
    writer_rate: FloatArray  # of one decode unit
    reader_units: IntArray
    writer_units: IntArray
    rate: FloatArray  # requests/s of the job; 0 where the pair keeps no target or does not fit

    @classmethod
    def of(
        cls,
        model: ModelSpec,
        cluster: Cluster,
        workload: ServingWorkload,
        fixed: Constraints,
        stack: ServingStack,
        by_layer: bool,
    ) -> _Pairs:
        units = pool_candidates(model, cluster, fixed)
        writers = units.take(units.pp == 1) if stack.name == ENGINE_OF_ONE_STAGE else units
        if len(units) == 0 or len(writers) == 0:
            raise InputError(
                f"no two pools on {cluster.gpus} GPUs are legal here; leave --tp, --pp and --ep out, or use --pp 1"
            )
        # prompts at a time: powers of two up to what a pass holds
        x = serving_engine(model, cluster, workload, units, stack)
        steps = int(np.log2(max(x.stack.max_tokens / max(workload.read_tokens, 1.0), 1.0))) + 1
        row = np.repeat(np.arange(len(units)), steps)
        readers = units.take(row)
        x = serving_engine(model, cluster, workload, readers, stack)
        reading = reading_replicas(x, workload, np.exp2(np.tile(np.arange(steps, dtype=np.float64), len(units))))
        y = serving_engine(model, cluster, workload, writers, stack)
        writing = writing_replicas(y, workload)
        sent, taken = cache_shares(x, float(workload.prompt)), cache_shares(y, float(workload.prompt))
        transfer = transfer_seconds(cluster, sent, taken)
        exposed = exposed_seconds(transfer, reading.reading_s[:, None], model.num_layers, by_layer)
        # how busy the readers may be: all of it that the engine reaches, or as the target on the first token allows
        after = reading.reading_s[:, None] + exposed + writing.tpot_s[None, :]
        spare = np.full_like(after, np.inf) if workload.ttft_s is None else workload.ttft_s - after
        beat = np.broadcast_to(reading.beat_s[:, None], after.shape)
        busy = np.where(np.isinf(spare), 1.0, busy_share(beat, np.where(np.isinf(spare), 0.0, spare)))
        busy = np.minimum(busy, stack.occupancy)
        link = 1.0 / np.maximum(transfer, 1e-12)  # a replica's caches leave, or arrive, one after another
        per_reader = np.minimum(reading.prompts[:, None] / beat * busy, link)
        per_writer = np.minimum(writing.tokens_per_s[None, :] / workload.output, link)
        possible = reading.fits[:, None] & writing.fits[None, :] & _ranks_match(readers, writers)
        reader_rate = np.where(possible, per_reader * readers.dp[:, None], 0.0)
        writer_rate = np.where(possible, per_writer * writers.dp[None, :], 0.0)
        matched = matched_units(cluster.gpus, readers.world, writers.world, reader_rate, writer_rate)
        return cls(cluster, workload, readers, reading, writers, writing, taken.replica_bytes, transfer, exposed,
                   by_layer, reader_rate, writer_rate, *matched)  # fmt: skip

    def ranked(self, top: int) -> list[tuple[int, int]]:
        """The best pairs, one per pair of splits; those within a thousandth of one another by first token."""
        step = np.round(np.log(np.maximum(self.rate, 1e-30)), 3)
        order = np.lexsort((self.ttft_s().ravel(), -step.ravel()))
        found: dict[tuple[object, ...], tuple[int, int]] = {}
        for index in order:
            i, j = divmod(int(index), len(self.writers))
            if self.rate[i, j] <= 0 or len(found) == top:
                break
            split = (self.readers.config(i), self.writers.config(j))
            found.setdefault(split, (i, j))
        return list(found.values())

    def busy(self) -> FloatArray:
        """Share of the time that a reader works at the job's rate."""
        replicas = np.maximum(self.reader_units * self.readers.dp[:, None], 1)
        return self.rate / replicas * (self.reading.beat_s / self.reading.prompts)[:, None]

    def ttft_s(self) -> FloatArray:
        """Wait, reading, transfer and the decode pool's first step."""
        wait = queue_seconds(self.reading.beat_s[:, None], self.busy())
        return wait + self.reading.reading_s[:, None] + self.exposed_s + self.writing.tpot_s[None, :]

    def plan(self, i: int, j: int) -> DisaggregatedPlan:
        """One pair in plain numbers, the readers as busy as the rate makes them."""
        units, others = int(self.reader_units[i, j]), int(self.writer_units[i, j])
        rate = float(self.rate[i, j])
        busy = self.busy()[i, j]
        wait = float(queue_seconds(self.reading.beat_s[i], busy))
        config, other = _pool_config(self.readers.config(i), units), _pool_config(self.writers.config(j), others)
        reading, tpot = float(self.reading.reading_s[i]), float(self.writing.tpot_s[j])
        transfer = CacheTransfer(float(self.cache_bytes[j]), float(self.transfer_s[i, j]),
                                 float(self.exposed_s[i, j]), self.by_layer)  # fmt: skip
        tokens = rate * self.workload.output
        return DisaggregatedPlan(
            prefill=PrefillPool(config, int(self.reading.prompts[i]), reading, wait, float(busy),
                                float(self.reading.weights_bytes[i])),
            decode=DecodePool(other, int(self.writing.sequences[j]), int(self.writing.max_sequences[j]), tpot,
                              float(self.writing.weights_bytes[j])),
            transfer=transfer,
            requests_per_s=rate,
            ttft_s=wait + reading + transfer.exposed_s + tpot,
            tpot_s=tpot,
            tokens_per_s=tokens,
            tokens_per_s_per_gpu=tokens / self.cluster.gpus,
            idle_gpus=self.cluster.gpus - config.world_size - other.world_size,
            limit=self._limit(i, j, units, others),
        )  # fmt: skip

    def _limit(self, i: int, j: int, units: int, others: int) -> str:
        link = 1.0 / max(float(self.transfer_s[i, j]), 1e-12)
        reads = units * float(self.reader_rate[i, j]) <= others * float(self.writer_rate[i, j])
        replica = self.reader_rate[i, j] / self.readers.dp[i] if reads else self.writer_rate[i, j] / self.writers.dp[j]
        if float(replica) >= link:
            return "link"
        return "prefill" if reads else "decode"


def matched_units(
    gpus: int, reader_gpus: IntArray, writer_gpus: IntArray, reader_rate: FloatArray, writer_rate: FloatArray
) -> tuple[IntArray, IntArray, FloatArray]:
    """For every pair [i, j] the numbers of units of both pools with the highest rate, and that rate: for each number of
    decode units as many prefill units as GPUs are left for."""
    shape = reader_rate.shape
    best, readers, writers = np.zeros(shape), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for count in range(1, gpus // int(writer_gpus.min()) + 1):
        left = gpus - count * writer_gpus
        units = np.maximum(left, 0)[None, :] // reader_gpus[:, None]
        rate = np.minimum(units * reader_rate, count * writer_rate)
        better = rate > best
        best = np.where(better, rate, best)
        readers, writers = np.where(better, units, readers), np.where(better, count, writers)
    return readers, writers, best


def _ranks_match(readers: Candidates, writers: Candidates) -> BoolArray:
    """One tp size divides the other, so that each rank's heads come from whole ranks."""
    first, second = readers.tp[:, None], writers.tp[None, :]
    return np.logical_or(first % second == 0, second % first == 0)


def _pool_config(unit: HybridParallelConfig, units: int) -> HybridParallelConfig:
    return replace(unit, dp=unit.dp * units, global_batch=unit.dp * units)


def _sentence(best: tuple[DisaggregatedPlan, ...], plain: ServingEstimate | None, workload: ServingWorkload) -> str:
    """Whether two pools pay, and why."""
    if not best:
        return "no two pools hold the model and keep the targets" + ("" if plain is None else "; one pool does")
    plan = best[0]
    if plain is None:
        return "nothing keeps the targets in one pool: its passes read prompts and decode together"
    gain = plan.tokens_per_s_per_gpu / plain.tokens_per_s_per_gpu
    held, held_plain = _sequences_per_gpu(plan), plain.sequences / (plain.config.tp * plain.config.pp)
    writing = plan.decode.config.world_size
    share = writing / (writing + plan.prefill.config.world_size + plan.idle_gpus)
    if gain >= 1.0:
        return (
            f"two pools are {gain:.2f} times as good: passes that read no prompts hold {held:.1f} sequences per "
            f"decoding GPU at {plan.tpot_s * 1e3:.1f} ms per token, mixed ones {held_plain:.1f} at "
            f"{plain.tpot_s * 1e3:.1f} ms"
        )
    return (
        f"one pool is {1.0 / gain:.2f} times as good: of two only {share:.0%} of the GPUs decode ({held:.1f} sequences "
        f"each at {plan.tpot_s * 1e3:.1f} ms per token), of one all do ({held_plain:.1f} each at "
        f"{plain.tpot_s * 1e3:.1f} ms)"
    )


def _sequences_per_gpu(plan: DisaggregatedPlan) -> float:
    return plan.decode.sequences / (plan.decode.config.tp * plan.decode.config.pp)


__all__ = ["CacheTransfer", "DecodePool", "DisaggregatedPlan", "DisaggregatedResult", "PrefillPool",
           "disaggregated_search", "matched_units"]  # fmt: skip
