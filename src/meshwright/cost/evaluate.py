"""The cost model's front door: `evaluate` prices many candidates at once, `estimate` one in full detail.

In: model, cluster, workload, candidates (or one config), software stack. Out: `Evaluation` arrays or an `Estimate`.
Both run the same array code; in-layer costs are computed once per distinct in-layer setting and gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.cost.blueprint import blueprint, blueprint_of
from meshwright.cost.candidates import BoolArray, Candidates, Chunk, FloatArray, unit_keys
from meshwright.cost.confidence import confidence
from meshwright.cost.device import device_of
from meshwright.cost.device import network as network_constants
from meshwright.cost.estimate import TIME_PARTS, Estimate, Evaluation, Memory, StageMemory, StepTime
from meshwright.cost.memory import MemoryArrays, training_memory
from meshwright.cost.memory_peak import peak_bytes, peak_memory
from meshwright.cost.shared_cores import taking_turns
from meshwright.cost.stack import Stack, default_stack
from meshwright.cost.stages import Stages, stages
from meshwright.cost.step import Machine, StepArrays, step_arrays, step_seconds, with_stalls
from meshwright.cost.throughput import efficiency, throughput, tokens_per_s_per_gpu, utilisation
from meshwright.cost.traffic import RankPlace, ledger_entries, training_traffic
from meshwright.cost.workload import Workload
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import HybridParallelConfig
from meshwright.ledger import MemoryKind
from meshwright.models.spec import ModelSpec

CHUNK_ROWS = 524_288
"""Rows priced at once: the working set of a chunk stays in a few hundred MB."""


def machine_of(cluster: Cluster, stack: Stack | None = None) -> Machine:
    """The constants that belong to a cluster, and the stack (the default one where None)."""
    return Machine(cluster, device_of(cluster.accelerator), network_constants(), stack or default_stack())


@dataclass(frozen=True)
class Priced:
    """Memory and time of a set of candidates, and their stages."""

    stages: Stages
    memory: MemoryArrays
    step: StepArrays


def evaluate(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    candidates: Candidates,
    stack: Stack | None = None,
    prune: bool = False,
) -> Evaluation:
    """Memory and time of every candidate. With `prune` a row that does not fit is not timed: its step is inf."""
    machine = machine_of(cluster, stack)
    if len(candidates) <= CHUNK_ROWS:
        return _evaluate_chunk(model, workload, machine, candidates, prune)
    ends = range(CHUNK_ROWS, len(candidates) + CHUNK_ROWS, CHUNK_ROWS)
    chunks = [candidates.take(np.arange(end - CHUNK_ROWS, min(end, len(candidates)))) for end in ends]
    parts = [_evaluate_chunk(model, workload, machine, chunk, prune) for chunk in chunks]
    return _joined(candidates, parts)


@dataclass(frozen=True)
class Screening:
    """Arrays [n] over candidates: what a search keeps or leaves them by. The step of one that does not fit is inf."""

    candidates: Candidates
    memory_bytes: FloatArray
    fits: BoolArray
    step_s: FloatArray


def screen(
    model: ModelSpec, cluster: Cluster, workload: Workload, candidates: Candidates, stack: Stack | None = None
) -> Screening:
    """`evaluate(.., prune=True)` without parts and rates: memory of every candidate, time of those that fit."""
    machine = machine_of(cluster, stack)
    if machine.stack.stalls or cluster.shared_cores is not None:  # the step is more than its parts
        full = evaluate(model, cluster, workload, candidates, stack, prune=True)
        return Screening(candidates, full.memory_bytes, full.fits, full.step_s)
    chunk = Chunk.of(candidates)
    memory_bytes = peak_bytes(model, cluster, workload, chunk, machine.stack)
    fits = memory_bytes <= float(cluster.accelerator.memory_bytes)
    rows = np.flatnonzero(fits)
    step_s = np.full(len(candidates), np.inf)
    if len(rows):
        step_s[rows] = step_seconds(blueprint_of(model, workload, chunk.only(rows), machine.stack), machine)
    return Screening(candidates, memory_bytes, fits, step_s)


def estimate(
    model: ModelSpec, cluster: Cluster, workload: Workload, config: HybridParallelConfig, stack: Stack | None = None
) -> Estimate:
    """Everything the model says of one configuration."""
    return estimates(model, cluster, workload, [config], stack)[0]


def estimates(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    configs: Sequence[HybridParallelConfig],
    stack: Stack | None = None,
) -> tuple[Estimate, ...]:
    """Everything the model says of each of a few configurations (of one precision)."""
    if not configs:
        return ()
    candidates = Candidates.from_configs(configs)
    used = stack or default_stack()
    priced = price(model, workload, machine_of(cluster, used), candidates)
    terms = training_traffic(model, workload, candidates, priced.stages, unit_keys(candidates), RankPlace())
    found: list[Estimate] = []
    for row, config in enumerate(configs):
        parts = {name: float(seconds[row]) for name, seconds in priced.step.parts_s.items()}
        time = StepTime(parts, {axis: float(seconds[row]) for axis, seconds in priced.step.hidden_s.items()})
        rates = throughput(model, cluster, workload, config, time.step_s)
        here = _distinct_stages(priced.stages, row)
        memory = _memory(priced, cluster, row)
        peak = memory.peak.total_bytes
        found.append(
            Estimate(
                config=config,
                memory=memory,
                traffic={stage: ledger_entries(terms, row, role) for role, stage in here},
                time=time,
                throughput=rates,
                confidence=confidence(model, cluster, workload, config, used, time.step_s, peak),
                efficiency=efficiency(parts, rates.mfu),
            )
        )
    return tuple(found)


def price(model: ModelSpec, workload: Workload, machine: Machine, candidates: Candidates) -> Priced:
    """Memory and time of all candidates."""
    keys = unit_keys(candidates)
    roles = stages(model, candidates)
    memory = training_memory(model, machine.cluster, workload, candidates, roles, keys, machine.stack)
    step = step_arrays(blueprint(model, workload, candidates, machine.stack), machine)
    step = with_stalls(step, model, candidates, memory.peak_bytes, machine)
    return Priced(roles, memory, taking_turns(step, candidates, machine.cluster))


def _evaluate_chunk(
    model: ModelSpec, workload: Workload, machine: Machine, candidates: Candidates, prune: bool
) -> Evaluation:
    cluster = machine.cluster
    capacity = float(cluster.accelerator.memory_bytes)
    n = len(candidates)
    chunk = Chunk.of(candidates)
    memory_bytes, peak_stage = peak_memory(model, cluster, workload, chunk, machine.stack)
    fits = memory_bytes <= capacity
    rows = np.flatnonzero(fits) if prune else np.arange(n)
    parts: dict[str, FloatArray] = {name: np.zeros(n) for name in TIME_PARTS}
    step_s = np.full(n, np.inf)
    if len(rows):
        timed = candidates.take(rows)
        step = step_arrays(blueprint_of(model, workload, chunk.only(rows), machine.stack), machine, detail=False)
        step = taking_turns(with_stalls(step, model, timed, memory_bytes[rows], machine), timed, cluster)
        step_s[rows] = step.step_s
        for name, seconds in step.parts_s.items():
            parts[name][rows] = seconds
    rate = tokens_per_s_per_gpu(workload, candidates, step_s)
    return Evaluation(
        candidates=candidates,
        memory_bytes=memory_bytes,
        peak_stage=peak_stage,
        fits=fits,
        step_s=step_s,
        parts_s=parts,
        tokens_per_s_per_gpu=rate,
        mfu=utilisation(model, cluster, workload, candidates, rate),
    )


def _joined(candidates: Candidates, parts: list[Evaluation]) -> Evaluation:
    def column(name: str) -> FloatArray:
        return np.concatenate([getattr(p, name) for p in parts])

    return Evaluation(
        candidates=candidates,
        memory_bytes=column("memory_bytes"),
        peak_stage=np.concatenate([p.peak_stage for p in parts]),
        fits=np.concatenate([p.fits for p in parts]),
        step_s=column("step_s"),
        parts_s={name: np.concatenate([p.parts_s[name] for p in parts]) for name in TIME_PARTS},
        tokens_per_s_per_gpu=column("tokens_per_s_per_gpu"),
        mfu=column("mfu"),
    )


def _distinct_stages(roles: Stages, row: int) -> list[tuple[int, int]]:
    """(role, stage) of a candidate's roles that stand for any stage."""
    return [(role, int(roles.index[row, role])) for role in np.flatnonzero(roles.weight[row]).tolist()]


def _memory(priced: Priced, cluster: Cluster, row: int) -> Memory:
    def of(role: int) -> dict[MemoryKind, int]:
        return {kind: round(float(nbytes[row, role])) for kind, nbytes in priced.memory.by_kind.items()}

    found = tuple(StageMemory(stage, of(role)) for role, stage in _distinct_stages(priced.stages, row))
    return Memory(found, cluster.accelerator.memory_bytes)
