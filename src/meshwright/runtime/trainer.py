"""Train a plan: what every rank of a job does from its first step, or from a checkpoint, to its last.

In: a `TrainingJob` on every rank of a world that torch.distributed has joined - forked or started by torchrun, it makes
no difference. Out: a `RankOutcome`; metrics, checkpoints and the exported model are in the job's folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from meshwright.errors import InputError
from meshwright.flight import FLIGHT_FOLDER, FlightLog
from meshwright.flight.incident import clear, write_states
from meshwright.flight.layout import SAVING
from meshwright.ledger import TrafficEntry
from meshwright.measurements import RankTimeline
from meshwright.plan import Plan, TrainingRun, TrainingWorkload
from meshwright.runtime import checkpoint
from meshwright.runtime.async_checkpoint import AsyncCheckpoints
from meshwright.runtime.data import TokenData
from meshwright.runtime.engine import Engine, EngineOptions, StepResult, build_engine
from meshwright.runtime.families import family_of
from meshwright.runtime.flight_log import flying
from meshwright.runtime.host_memory import keep_freed_memory
from meshwright.runtime.launch import Device, host_name, run_ranks
from meshwright.runtime.metrics import MetricsWriter, Peak, StepMetrics, mfu, peak_memory_bytes
from meshwright.runtime.oom_kill import noting_kills
from meshwright.runtime.optimizer import OptimizerOptions
from meshwright.runtime.preflight import Needs, check_start
from meshwright.runtime.process_groups import ProcessGroupManager, check_same_plan
from meshwright.runtime.rank_record import FailureNote, RankRecord, place_of, resident_bytes_now
from meshwright.runtime.safetensors_io import SafetensorsWeights, save_pretrained
from meshwright.runtime.step_trace import StepTrace
from meshwright.runtime.train_progress import TrainingProgress
from meshwright.runtime.watchdog import OnHang, watching
from meshwright.runtime.weights import SeededWeights, WeightSource, meta_model

CHECKPOINTS, EXPORT, TOKENS = "checkpoints", "model", "tokens"
"""Folders of a run."""
COLLECTIVE_TIMEOUT_S = 1800.0
WARM_STEPS = 2
"""Not traced, where nobody names a step."""


@dataclass(frozen=True)
class TrainingJob:
    """All that ranks need. `plan.training` is complete: what the command line overrides is in it already.

    `checkpoint_every`: steps between checkpoints (None: one at the end); `keep`: how many stay. `resume`: a checkpoint
    to go on from. `weights`: a folder of safetensors to start from instead of the seed. `export`: write the trained
    model as safetensors. `preflight`: forked ranks check each other first. `watchdog_s`: a rank that waits longer than
    this in one collective ends the job; `on_hang` is told the run's folder first. `trace`: ranks bring back the
    timeline of a step, `trace_step` counted from 1 (None: the third that is done here, or the last).
    """

    plan: Plan
    model_config: Any
    tokens: Path
    out: Path
    checkpoint_every: int | None = None
    keep: int = 2
    resume: Path | None = None
    weights: Path | None = None
    export: bool = False
    tensorboard: bool = False
    show_progress: bool = True
    peak: Peak | None = None
    preflight: Needs | None = None
    watchdog_s: float | None = None
    on_hang: OnHang | None = None
    trace: bool = False
    trace_step: int | None = None

    @property
    def run(self) -> TrainingRun:
        return self.plan.training or TrainingRun()

    @property
    def seq(self) -> int:
        if not isinstance(self.plan.workload, TrainingWorkload):
            raise InputError("this is a plan for serving; train needs one whose workload is training")
        return self.plan.workload.seq


@dataclass(frozen=True)
class RankOutcome:
    """What a rank brings back. `losses`: of the steps done here, on every rank the same; `ledger`: of the last step;
    `shard`: place among the ranks that share sharded state.
    `diverged_at`: the step whose loss was not finite, at which the run stopped. `timeline`: of the step that was to be
    traced."""

    rank: int
    stage: int
    tp_rank: int
    shard: int
    first_step: int
    losses: tuple[float, ...]
    tokens_per_s: float
    ledger: tuple[TrafficEntry, ...]
    peak_memory_bytes: int
    checkpoint: Path | None
    diverged_at: int | None = None
    timeline: RankTimeline | None = None


def train_rank(job: TrainingJob, device: Device) -> RankOutcome:
    """The whole run of one rank."""
    data = TokenData(job.tokens, job.seq, job.run.seed, int(job.model_config.vocab_size))
    clear(job.out, dist.get_world_size())
    check_same_plan(f"{job.plan.digest()} {data.digest} {job.resume}", _get_default_store())
    resident = resident_bytes_now()
    keep_freed_memory(device)
    groups = ProcessGroupManager(job.plan.parallel, device)
    with (
        flying(job.out, groups, job.plan.digest()) as log,
        watching(log, job.out, job.watchdog_s, job.on_hang),
        FailureNote(job.out, groups, log, resident) as note,
    ):
        engine = build_engine(job.plan.parallel, job.model_config, groups, weight_source(job), engine_options(job))
        note.engine = engine
        consumed = 0 if job.resume is None else _resume(job, engine, data)
        if engine.steps_done >= job.run.steps and job.resume is not None:
            done = engine.steps_done
            raise InputError(f"{job.resume} has done {done} of {job.run.steps} steps already; raise --steps")
        with RankRecord(job.out, place_of(engine, host_name()), engine, resident) as record:
            outcome = Trainer(job, engine, data, consumed, record, log).train()
        if job.export and outcome.diverged_at is None:
            save_pretrained(engine, job.model_config, job.out / EXPORT)
    return outcome


def weight_source(job: TrainingJob) -> WeightSource:
    if job.weights is not None:
        return SafetensorsWeights(job.weights)
    return SeededWeights(job.model_config, family_of(job.model_config), job.run.seed)


def engine_options(job: TrainingJob) -> EngineOptions:
    """The plan's training section in the engine's terms. A clip of 0 means none."""
    run = job.run
    optimizer = OptimizerOptions(
        learning_rate=run.learning_rate,
        weight_decay=run.weight_decay,
        clip_norm=run.gradient_clip or None,
        warmup_steps=run.warmup_steps,
        total_steps=run.steps,
    )
    workload = job.plan.workload
    capacity = workload.capacity_factor if isinstance(workload, TrainingWorkload) else None
    return EngineOptions(seq=job.seq, optimizer=optimizer, seed=run.seed, capacity_factor=capacity)


def _traced_step(job: TrainingJob, done: int) -> int:
    """The step whose timeline is recorded, once memory and connections are warm."""
    last = job.run.steps
    chosen = min(done + WARM_STEPS + 1, last) if job.trace_step is None else job.trace_step
    if not done < chosen <= last:
        raise InputError(f"--trace-step {chosen}: this run does steps {done + 1} to {last}")
    return chosen


def _resume(job: TrainingJob, engine: Engine, data: TokenData) -> int:
    """Put the engine where a checkpoint stands; returns the sequences consumed by then."""
    assert job.resume is not None
    progress = checkpoint.read_progress(job.resume)
    if progress.seed != job.run.seed:
        raise InputError(
            f"{job.resume} was trained with seed {progress.seed}, this run has seed {job.run.seed}: the order of the "
            f"data would change; set training.seed to {progress.seed}"
        )
    if progress.seq != job.seq:
        raise InputError(
            f"{job.resume} was trained on sequences of {progress.seq} tokens, this plan has {job.seq}: the position in "
            "the data would be lost"
        )
    if progress.data != data.digest:
        raise InputError(
            f"{job.resume} was trained on other tokens than --data gives now: the text or the tokenizer has changed"
        )
    return checkpoint.load(engine, job.resume).sequences


class Trainer:
    """Steps, metrics and checkpoints of one rank. `sequences` of the data were consumed before the first step."""

    def __init__(
        self,
        job: TrainingJob,
        engine: Engine,
        data: TokenData,
        sequences: int,
        record: RankRecord,
        log: FlightLog,
    ) -> None:
        self.job = job
        self.record = record
        self.log = log
        self.engine = engine
        self.data = data
        self.sequences = sequences
        self.device = engine.groups.device.torch
        self.timeline: RankTimeline | None = None
        self._traced_step = _traced_step(job, engine.steps_done) if job.trace else None

    def train(self) -> RankOutcome:
        """From where the engine stands to the plan's last step, or until the loss is not finite."""
        first, losses = self.engine.steps_done, list[float]()
        diverged = False
        started = time.perf_counter()
        folder = self.job.out / CHECKPOINTS
        with (
            self._progress(first) as progress,
            _Rank0Writer(self.job, first) as writer,
            AsyncCheckpoints(folder, self.job.plan, self.job.model_config, self.job.keep) as checkpoints,
        ):
            while self.engine.steps_done < self.job.run.steps and not diverged:
                metrics = self.step()
                losses.append(metrics.loss)
                writer.step(metrics)
                progress.show(metrics)
                diverged = not math.isfinite(metrics.loss)
                if checkpoints.has_ended:
                    self.log.activity(SAVING)  # what is raised now is about a checkpoint
                    checkpoints.close()
                if not diverged and self._checkpoint_is_due():
                    self.log.activity(SAVING)
                    checkpoints.start(self.engine, self._position())
            elapsed = time.perf_counter() - started
            self.log.activity(SAVING)
            checkpoints.close()
            outcome = self._outcome(first, losses, elapsed, checkpoints.last, diverged)
            writer.ledgers(outcome, self.engine.steps_done)
        return replace(outcome, timeline=self.timeline)

    def step(self) -> StepMetrics:
        """One step on this dp rank's share of the next global batch."""
        recorder, config = self.engine.groups.recorder, self.job.plan.parallel
        per_rank = config.global_batch // config.dp
        first = self.sequences + self.engine.groups.axis("dp").rank * per_rank
        started = time.perf_counter()
        tokens, labels = self.data.batch(first, per_rank)
        recorder.reset()
        self.log.step_begins(self.engine.steps_done)
        with self._traced():
            result = self.engine.step(tokens.to(self.device), labels.to(self.device))
        self.log.step_ends()
        self.sequences += config.global_batch
        step_s = time.perf_counter() - started
        self.record.step(step_s)
        return self._metrics(result, step_s)

    @contextmanager
    def _traced(self) -> Iterator[None]:
        """Make a timeline of the step inside, if it is the one that was asked for."""
        number, groups = self.engine.steps_done + 1, self.engine.groups
        if number != self._traced_step:
            yield
            return
        trace = groups.recorder.trace = StepTrace(tells_ends=self.device.type == "cpu")
        try:
            yield
        finally:
            groups.recorder.trace = None
        self.timeline = trace.finish(groups.rank, groups.axis("pp").rank, number)

    def _metrics(self, result: StepResult, step_s: float) -> StepMetrics:
        per_s = result.tokens / step_s
        per_rank = per_s / self.job.plan.parallel.world_size
        return StepMetrics(
            step=self.engine.steps_done,
            loss=result.loss,
            gradient_norm=result.gradient_norm,
            learning_rate=result.learning_rate,
            tokens=result.tokens,
            sequences=self.sequences,
            step_s=step_s,
            tokens_per_s=per_s,
            tokens_per_s_per_rank=per_rank,
            mfu=mfu(per_rank, self.device, self.job.peak),
            axis_wait_s=self.engine.groups.recorder.waited_s(),
            peak_memory_bytes=peak_memory_bytes(self.device),
            loss_scale=self.engine.scaler.scale if self.engine.scaler else None,
            skipped=result.skipped,
            router_load=self.engine.router_load(),
        )

    def _checkpoint_is_due(self) -> bool:
        done, every = self.engine.steps_done, self.job.checkpoint_every
        return done == self.job.run.steps or (every is not None and done % every == 0)

    def _position(self) -> checkpoint.DataPosition:
        return checkpoint.DataPosition(self.sequences, self.job.run.seed, self.job.seq, self.data.digest)

    def _progress(self, first: int) -> TrainingProgress:
        return TrainingProgress(first, self.job.run.steps, self.job.show_progress and dist.get_rank() == 0)

    def _outcome(
        self, first: int, losses: list[float], elapsed_s: float, saved: Path | None, diverged: bool
    ) -> RankOutcome:
        config = self.job.plan.parallel
        return RankOutcome(
            rank=dist.get_rank(),
            stage=self.engine.groups.axis("pp").rank,
            tp_rank=self.engine.groups.axis("tp").rank,
            shard=self.engine.groups.axis("zero_shard").rank,
            first_step=first,
            losses=tuple(losses),
            tokens_per_s=len(losses) * config.global_batch * self.job.seq / elapsed_s,
            ledger=self.engine.groups.recorder.traffic(),
            peak_memory_bytes=peak_memory_bytes(self.device),
            checkpoint=saved,
            diverged_at=self.engine.steps_done if diverged else None,
        )


class _Rank0Writer:
    """The metrics file on rank 0, nothing on the others: callers need not ask."""

    def __init__(self, job: TrainingJob, first: int) -> None:
        self._writer = MetricsWriter(job.out, first, job.tensorboard) if dist.get_rank() == 0 else None
        if self._writer:
            self._writer.run(
                {
                    "first_step": first,
                    "steps": job.run.steps,
                    "ranks": dist.get_world_size(),
                    "plan": job.plan.to_dict(),
                    "resumed_from": None if job.resume is None else str(job.resume),
                }
            )

    def __enter__(self) -> _Rank0Writer:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._writer:
            self._writer.__exit__(*error)

    def step(self, metrics: StepMetrics) -> None:
        if self._writer:
            self._writer.step(metrics)

    def ledgers(self, own: RankOutcome, step: int) -> None:
        """The last step's ledger of one rank per stage. Called on all ranks: they send theirs to rank 0."""
        outcomes = gather_outcomes(own)
        if self._writer:
            for stage in sorted({o.stage for o in outcomes}):
                o = next(o for o in outcomes if o.stage == stage)
                self._writer.ledger(step, o.rank, o.stage, o.ledger, o.peak_memory_bytes)


def gather_outcomes(own: RankOutcome) -> list[RankOutcome]:
    """Every rank's outcome, on every rank, in rank order."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def train_forked(job: TrainingJob) -> list[RankOutcome]:
    """Every rank forked on this machine, on its CPU; all outcomes. An idle group fails after `COLLECTIVE_TIMEOUT_S`."""
    meta_model(job.model_config)  # imports the model's code once, before the ranks fork
    ranks = job.plan.parallel.world_size
    flight = job.out / FLIGHT_FOLDER

    def note(rank: int) -> None:
        write_states(flight, rank, first_only=True)

    with noting_kills(job.out):
        return run_ranks(ranks, _cpu_rank, job, timeout_s=COLLECTIVE_TIMEOUT_S, endless=True, on_failure=note)


def train_joined(job: TrainingJob, device: Device) -> list[RankOutcome]:
    """This rank of a world that torchrun prepared; all outcomes, on every rank."""
    return gather_outcomes(train_rank(job, device))


def _cpu_rank(job: TrainingJob) -> RankOutcome:
    device = Device("cpu", "gloo")
    if job.preflight is not None:
        check_start(job.plan, job.preflight, device, _get_default_store(), dist.get_rank())
    return train_rank(job, device)
