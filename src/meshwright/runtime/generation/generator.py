"""Generate from a plan: what every rank does from its weights to the last token, and how ranks are started.

In: a `GenerationJob` on every rank of a world that torch.distributed has joined. Out: `Generated`: the new tokens of
every prompt, in the order of the prompts, whatever the layout.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig, Recompute, Schedule
from meshwright.ledger import Phase, TrafficEntry
from meshwright.runtime.engine import COMPUTE_DTYPES, EngineOptions, build_chunks, pipeline_schedule
from meshwright.runtime.families import expert_count, family_of
from meshwright.runtime.generation.checkpoint_weights import CheckpointWeights
from meshwright.runtime.generation.pipeline import FILLER, Batch, GenerationPipeline
from meshwright.runtime.generation.progress import GenerationProgress
from meshwright.runtime.generation.sampler import Sampling
from meshwright.runtime.launch import Device, run_ranks
from meshwright.runtime.process_groups import ProcessGroupManager, check_same_plan
from meshwright.runtime.safetensors_io import SafetensorsWeights
from meshwright.runtime.weights import SeededWeights, WeightSource, meta_model

IDLE_TIMEOUT_S = 1800.0
LARGEST_BATCH = 16


@dataclass(frozen=True)
class GenerationJob:
    """All that ranks need. `prompts`: token ids. Weights come from `checkpoint` (of train, any layout), `weights`
    (safetensors), or `weights_seed`. `ends`: tokens that end an answer. `batch`: sequences of one batch (None: prompts
    spread over the stages, at most 16)."""

    config: HybridParallelConfig
    model_config: Any
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    ends: frozenset[int] = frozenset()
    weights: Path | None = None
    checkpoint: Path | None = None
    weights_seed: int = 0
    batch: int | None = None
    digest: str = ""
    show_progress: bool = True


@dataclass(frozen=True)
class Generated:
    """`tokens[i]` are the new tokens of prompt i, its end token included. `ledger`: of rank 0."""

    tokens: tuple[tuple[int, ...], ...]
    seconds: float
    ledger: tuple[TrafficEntry, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        return sum(len(t) for t in self.tokens) / self.seconds


@dataclass(frozen=True)
class RankResult:
    """What a rank brings back: its replica's prompts by number."""

    tokens: dict[int, list[int]]
    seconds: float
    ledger: tuple[TrafficEntry, ...]


def generation_config(config: HybridParallelConfig) -> HybridParallelConfig:
    """The plan's axes without what only training has."""
    if config.cp > 1:
        raise InputError(f"cp={config.cp}: generation splits no sequence; use cp=1")
    if config.ep * config.expert_tp > config.tp:
        raise InputError(
            f"ep x expert_tp = {config.ep * config.expert_tp} spreads experts over replicas, which answer at their own "
            f"pace here; use ep x expert_tp = tp = {config.tp}"
        )
    return replace(
        config,
        sequence_parallel=False,
        vpp=1,
        schedule=Schedule.ONE_F_ONE_B,
        zero=0,
        zero_shards=None,
        recompute=Recompute.NONE,
        micro_batch=1,
        global_batch=config.dp,
        layer_split=config.layer_split if config.vpp == 1 else None,
    )


def check_job(job: GenerationJob) -> None:
    """InputError for what no rank could do, before any is started."""
    generation_config(job.config)
    if job.config.precision not in COMPUTE_DTYPES:
        raise InputError(f"precision {job.config.precision} cannot be generated in; use {', '.join(COMPUTE_DTYPES)}")
    vocabulary = int(job.model_config.vocab_size)
    positions = getattr(job.model_config, "max_position_embeddings", None) or getattr(
        job.model_config, "n_positions", 0
    )
    for number, prompt in enumerate(job.prompts):
        if not prompt:
            raise InputError(f"prompt {number + 1} is empty")
        if max(prompt) >= vocabulary or min(prompt) < 0:
            raise InputError(f"prompt {number + 1} has token {max(prompt)}, the vocabulary ends at {vocabulary - 1}")
        if positions and len(prompt) + job.new_tokens > positions:
            raise InputError(
                f"prompt {number + 1} of {len(prompt)} tokens and {job.new_tokens} new ones are more than the model's "
                f"{positions} positions"
            )


class GenerationRank:
    """A rank of the job with its weights in place; `answer` may be called any number of times."""

    def __init__(self, job: GenerationJob, device: Device) -> None:
        self._job, self._device, self._config = job, device, generation_config(job.config)
        check_same_plan(f"{job.digest} {job.prompts} {job.sampling} {job.new_tokens}", _get_default_store())
        self._groups = groups = ProcessGroupManager(self._config, device)
        self._dtype = COMPUTE_DTYPES[self._config.precision]
        schedule = pipeline_schedule(self._config, forward_only=True)
        source, options = weight_source(job), EngineOptions(seq=1)
        chunks = build_chunks(self._config, job.model_config, groups, source, options, schedule, self._dtype, None)
        (self._stage,) = (chunk.module for chunk in chunks.values())
        self._stage.eval()
        ranks = list(groups.axis("pp").ranks)
        back = dist.new_group(ranks, use_local_synchronization=True, group_desc=f"tokens:{ranks[0]}")
        assert isinstance(back, dist.ProcessGroup)
        self._back = back

    def answer(self) -> RankResult:
        """All prompts of this rank's replica, from their first token to their last."""
        job, config, groups = self._job, self._config, self._groups
        pp, tp = groups.axis("pp"), groups.axis("tp")
        mine = range(groups.axis("dp").rank, len(job.prompts), config.dp)
        own_batches = batches(job, list(mine), config, self._device.torch)
        dist.barrier()
        started = time.perf_counter()
        shown = job.show_progress and groups.rank == 0
        with GenerationProgress(len(mine) * job.new_tokens, shown) as progress, torch.inference_mode():
            pipeline = GenerationPipeline(
                self._stage,
                pp,
                self._back,
                tp,
                job.sampling,
                job.new_tokens,
                job.ends,
                self._dtype,
                self._device.torch,
                progress.add,
            )
            with groups.recorder.during(Phase.FORWARD):
                pipeline.run(own_batches, max(1, min(config.pp, len(own_batches))))
        seconds = time.perf_counter() - started
        answers = ((n, new) for batch in own_batches for n, new in zip(batch.numbers, batch.new, strict=True))
        found = {number: new for number, new in answers if number != FILLER}
        return RankResult(found if tp.is_first and pp.is_first else {}, seconds, groups.recorder.traffic())


def generate_rank(job: GenerationJob, device: Device) -> RankResult:
    """The whole job of one rank."""
    return GenerationRank(job, device).answer()


def batches(
    job: GenerationJob, numbers: Sequence[int], config: HybridParallelConfig, device: torch.device
) -> list[Batch]:
    """A replica's prompts in batches: at least one per stage where there are enough."""
    if not numbers:
        return []
    size = job.batch or max(1, min(LARGEST_BATCH, -(-len(numbers) // config.pp)))
    cut = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    multiple = config.tp if expert_count(job.model_config, family_of(job.model_config)) else 1
    return [Batch.of(part, [job.prompts[n] for n in part], job.new_tokens, device, multiple) for part in cut]


def weight_source(job: GenerationJob) -> WeightSource:
    if job.checkpoint is not None:
        return CheckpointWeights(job.checkpoint)
    if job.weights is not None:
        return SafetensorsWeights(job.weights)
    return SeededWeights(job.model_config, family_of(job.model_config), job.weights_seed)


def generate_forked(job: GenerationJob) -> Generated:
    """Every rank forked on this machine, on its CPU."""
    check_job(job)
    meta_model(job.model_config)  # imports the model's code once, before the ranks fork
    return _joined_results(
        run_ranks(job.config.world_size, _cpu_rank, job, timeout_s=IDLE_TIMEOUT_S, endless=True), len(job.prompts)
    )


def generate_joined(job: GenerationJob, device: Device) -> Generated:
    """This rank of a world that torchrun prepared; the whole result on every rank."""
    check_job(job)
    own = generate_rank(job, device)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return _joined_results(found, len(job.prompts))


def _cpu_rank(job: GenerationJob) -> RankResult:
    return generate_rank(job, Device("cpu", "gloo"))


def _joined_results(results: Sequence[RankResult], prompts: int) -> Generated:
    every = {number: tokens for result in results for number, tokens in result.tokens.items()}
    return Generated(tuple(tuple(every[n]) for n in range(prompts)), max(r.seconds for r in results), results[0].ledger)
