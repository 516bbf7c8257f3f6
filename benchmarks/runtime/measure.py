"""CPU and wall seconds per step: of one plain process, of two at once, of one with both cores, of a layout's ranks.

Two steps that are not counted come first: they allocate, and start the backends' threads. (Two, because the first
creates the optimizer's state at its end, and the heap grows around it once more: the second step of a plain process
spends 2 to 4 s in the kernel, the third 1 to 2.)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.runtime.work import Layout, Work
from torch import nn

from meshwright.runtime.engine import EngineOptions, build_engine
from meshwright.runtime.families import family_of
from meshwright.runtime.host_memory import keep_freed_memory
from meshwright.runtime.launch import Device, run_ranks
from meshwright.runtime.optimizer import OptimizerOptions
from meshwright.runtime.process_groups import ProcessGroupManager
from meshwright.runtime.weights import SeededWeights, meta_model, reference_model

TIMEOUT_S = 3600
STEPS_BEFORE = 2
"""Not counted; of peers as well."""


@dataclass(frozen=True)
class Sample:
    """CPU and wall seconds per step of one rank, and the loss of its first step."""

    cpu_s: float
    wall_s: float
    loss: float


@dataclass(frozen=True)
class Reading:
    """One round's reading of all ranks: the slowest rank's wall time is the step's."""

    cpu_s_mean: float
    cpu_s_slowest_rank: float
    wall_s: float
    loss: float

    @classmethod
    def of(cls, ranks: list[Sample]) -> Reading:
        cpu = [rank.cpu_s for rank in ranks]
        return cls(statistics.mean(cpu), max(cpu), max(rank.wall_s for rank in ranks), ranks[0].loss)


def timed(step: Callable[[], float], steps: int) -> Sample:
    """`step` returns its loss."""
    loss, *_ = [step() for _ in range(STEPS_BEFORE)]
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps):
        step()
    return Sample((time.process_time() - cpu) / steps, (time.perf_counter() - wall) / steps, loss)


def plain(work: Work, steps: int, processes: int = 1, threads: int = 1) -> Reading:
    """One process of plain transformers, or several that know nothing of each other."""
    return Reading.of(run_ranks(processes, _run_plain, work, steps, threads, timeout_s=TIMEOUT_S))


def layout(chosen: Layout, work: Work, steps: int) -> Reading:
    return Reading.of(run_ranks(chosen.config.world_size, _run_layout, chosen, work, steps, timeout_s=TIMEOUT_S))


def save_model(work: Work, folder: Path) -> None:
    """The weights that every run here starts from, for peers to load."""
    reference_model(work.model, 0, torch.float32).save_pretrained(folder)  # pyright: ignore[reportCallIssue]


def _run_plain(work: Work, steps: int, threads: int) -> Sample:
    """transformers' own training step, as its users write it."""
    torch.set_num_threads(threads)
    experts = meta_model(work.model).config._experts_implementation  # pyright: ignore[reportAttributeAccessIssue]
    model: Any = reference_model(work.model, 0, torch.float32)
    model.config._experts_implementation = experts  # the reference of parity runs them one by one
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    tokens, labels = work.batch()

    def step() -> float:
        logits = model(tokens, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return timed(step, steps)


def _run_layout(chosen: Layout, work: Work, steps: int) -> Sample:
    """What a rank of `meshwright train` runs."""
    config, device = chosen.config, Device("cpu", "gloo")
    keep_freed_memory(device)
    groups = ProcessGroupManager(config, device)
    options = EngineOptions(seq=work.seq, optimizer=OptimizerOptions())
    engine = build_engine(config, work.model, groups, SeededWeights(work.model, family_of(work.model), 0), options)
    tokens, labels = work.batch()
    own = config.global_batch // config.dp
    rows = slice(groups.axis("dp").rank * own, (groups.axis("dp").rank + 1) * own)
    return timed(lambda: engine.step(tokens[rows], labels[rows]).loss, steps)
