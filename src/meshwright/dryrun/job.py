"""One rank of a job, run for one step: under fake tensors for a world of any size, or for real in a world that exists.

In: a `DryJob` and a rank. Out: a `RankTrace`. Both ways run the runtime's own engine with the same tracer.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch.distributed as dist

from meshwright.dryrun.compare import Coordinate
from meshwright.dryrun.fold import FoldedStep, NotAlikeError, find_fold
from meshwright.dryrun.trace import Event, StatingRecorder, Tracer
from meshwright.dryrun.tracker import MemoryTrace, MemoryTracker
from meshwright.dryrun.watch import WatchedOperations, Watcher
from meshwright.dryrun.world import batch_of, fake_engine, fake_tensors, fake_world
from meshwright.layout.config import HybridParallelConfig
from meshwright.layout.grid import rank_layout
from meshwright.runtime.engine import Engine, EngineOptions, build_engine
from meshwright.runtime.expert_parallel import Routing
from meshwright.runtime.families import family_of
from meshwright.runtime.launch import Device
from meshwright.runtime.process_groups import ProcessGroupManager
from meshwright.runtime.weights import SeededWeights
from meshwright.schedules.actions import Action


@dataclass(frozen=True)
class DryJob:
    """What is run: a layout, a transformers config, and the length of sequences. `fold`: of microbatches that repeat
    each other a few are run (fold.py). `as_gloo`: memory as a live run on CPUs holds it, for comparisons: what was sent
    stays until the step's end (world.py), and reductions are scattered from a copy (tracker.py)."""

    config: HybridParallelConfig
    model_config: Any
    seq: int
    fold: bool = True
    as_gloo: bool = False

    @property
    def options(self) -> EngineOptions:
        """Tokens go to experts evenly, as the cost model assumes."""
        return EngineOptions(seq=self.seq, routing=Routing.BALANCED)


@dataclass(frozen=True)
class RankTrace:
    """What one rank did in a step. `seconds`: how long it took to find out; `folded`: microbatches that only repeat."""

    rank: int
    coordinate: Coordinate
    events: tuple[Event, ...]
    memory: MemoryTrace
    seconds: float
    folded: int = 0


def coordinate_of(config: HybridParallelConfig, rank: int) -> Coordinate:
    return {axis: int(at) for axis, at in rank_layout(config).coordinates(rank).items()}


def trace_rank(job: DryJob, rank: int) -> RankTrace:
    """A step of any rank of the job, without hardware."""
    began = perf_counter()
    if job.fold:
        with suppress(NotAlikeError):
            return _trace_fake(job, rank, began)
    return _trace_fake(replace(job, fold=False), rank, began)


@contextmanager
def no_collection() -> Iterator[None]:
    """Tensors go when the last reference does: collecting cycles takes long among so many objects, and comes at moments
    that differ from run to run."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _trace_fake(job: DryJob, rank: int, began: float) -> RankTrace:
    recorder = StatingRecorder()
    world = fake_world(rank, job.config.world_size, as_gloo=job.as_gloo)
    with world, fake_tensors() as mode, no_collection():
        engine = fake_engine(job.config, job.model_config, recorder, job.options)
        return _traced(job, rank, engine, recorder, mode.watched_by, began)


def trace_here(job: DryJob, device: Device, seed: int = 0) -> RankTrace:
    """A step of this process's rank of a world that torch.distributed has joined."""
    began, recorder = perf_counter(), StatingRecorder()
    groups = ProcessGroupManager(job.config, device, recorder)
    source = SeededWeights(job.model_config, family_of(job.model_config), seed)
    engine = build_engine(job.config, job.model_config, groups, source, job.options)
    return _traced(replace(job, fold=False, as_gloo=False), dist.get_rank(), engine, recorder, WatchedOperations, began)


def _traced(
    job: DryJob,
    rank: int,
    engine: Engine,
    recorder: StatingRecorder,
    watched_by: Callable[[Sequence[Watcher]], AbstractContextManager[object]],
    began: float,
) -> RankTrace:
    engine.optimizer.create_state()  # as in every step but the first
    tokens = batch_of(job.config, job.seq)
    tracer, tracker = Tracer(recorder), MemoryTracker(engine, job.as_gloo)

    def observe(step: tuple[Action, ...]) -> None:
        tracer.at(step)
        tracker.at(step)

    fold = find_fold(engine.executor.steps) if job.fold else None
    if fold is None:
        engine.executor.observe = observe
    else:
        engine.executor.follow(fold.run())
        engine.executor.observe = FoldedStep(fold, tracer, tracker).observe
    with tracker.watching(), watched_by((tracer, tracker)):
        engine.step(tokens, tokens)
    folded = 0 if fold is None else fold.microbatches
    at = coordinate_of(job.config, rank)
    return RankTrace(rank, at, tracer.finish(), tracker.result(), perf_counter() - began, folded)
