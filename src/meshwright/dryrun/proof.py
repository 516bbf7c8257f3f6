"""The proof of a plan: chosen ranks traced, their ledgers and memory compared, and the whole job shown not to hang.

In: a plan's parts and which ranks to run. Out: a `Proof`. The job is shown free of hangs on one rank of every stage
(and of every other role): ranks of a stage run one program, so that they arrive at their common collectives together,
and what they send along the pipeline meets at equal places of the other stages.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from time import perf_counter

from meshwright.cost.program.memory import written_down
from meshwright.cost.program.own_runtime import predicted_memory
from meshwright.cost.workload import Workload
from meshwright.dryrun.compare import Difference, differences, predicted_ledger, rank_place
from meshwright.dryrun.compose import Composer, CompositionError
from meshwright.dryrun.job import DryJob, RankTrace, trace_rank
from meshwright.dryrun.match import Finding, unmatched
from meshwright.dryrun.memory_verdict import MemoryDifference, memory_differences
from meshwright.dryrun.progress import stuck
from meshwright.dryrun.roles import stage_contents
from meshwright.dryrun.trace import Event, traffic_of
from meshwright.layout.grid import rank_layout
from meshwright.ledger import MemoryKind, TrafficEntry
from meshwright.models.spec import ModelSpec
from meshwright.runtime.engine import pipeline_schedule

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RankProof:
    """One rank: its trace, the ledger and the memory that the cost model predicts for it, and what differs.
    `peak_judged`: beside state also the peak counts for the verdict (memory_verdict.py)."""

    trace: RankTrace
    predicted: tuple[TrafficEntry, ...]
    traced: tuple[TrafficEntry, ...]
    differences: tuple[Difference, ...]
    predicted_memory: dict[MemoryKind, int]
    memory_differences: tuple[MemoryDifference, ...]
    peak_judged: bool

    @property
    def agrees(self) -> bool:
        return not self.differences and not self.memory_differences


@dataclass(frozen=True)
class Proof:
    """`findings`: what would hang. `matched`: the ranks whose traces were held against each other; those that were not
    run were composed from ranks of the same role. How long ranks were run, side by side, and then matched."""

    ranks: tuple[RankProof, ...]
    findings: tuple[Finding, ...]
    matched: tuple[int, ...]
    tracing_s: float
    matching_s: float

    @property
    def agrees(self) -> bool:
        return all(r.agrees for r in self.ranks) and not self.findings


def prove(
    job: DryJob, model: ModelSpec, workload: Workload, ranks: Sequence[int], progress: Progress | None = None
) -> Proof:
    """Run the ranks and hold them against the cost model and each other."""
    began = perf_counter()
    traces = trace_ranks(job, ranks, progress)
    traced = perf_counter()
    column = whole_column(job, model, traces)
    findings = unmatched(column) or stuck(column)
    compared = tuple(_compared(job, model, workload, t) for t in traces)
    return Proof(compared, findings, tuple(column), traced - began, perf_counter() - traced)


def _compared(job: DryJob, model: ModelSpec, workload: Workload, trace: RankTrace) -> RankProof:
    predicted = predicted_ledger(model, workload, job.config, trace.coordinate)
    traced = traffic_of(trace.events)
    place = rank_place(job.config, trace.coordinate)
    memory = predicted_memory(model, workload, job.config, trace.coordinate["pp"], place)
    judged = written_down(model)
    differ = memory_differences(memory, trace.memory, judged)
    return RankProof(trace, predicted, traced, differences(predicted, traced), memory, differ, judged)


def trace_ranks(job: DryJob, ranks: Sequence[int], progress: Progress | None = None) -> tuple[RankTrace, ...]:
    """Several at once, on the cores there are."""
    tell = progress or (lambda _done, _total: None)
    workers = min(len(ranks), os.cpu_count() or 1)
    tell(0, len(ranks))
    if workers == 1:
        found = [trace_rank(job, rank) for rank in ranks]
    else:
        context = multiprocessing.get_context("fork")
        found: list[RankTrace] = []
        with ProcessPoolExecutor(workers, context) as pool:
            for done in as_completed([pool.submit(trace_rank, job, rank) for rank in ranks]):
                found.append(done.result())
                tell(len(found), len(ranks))
    return tuple(sorted(found, key=lambda t: t.rank))


def whole_column(job: DryJob, model: ModelSpec, traces: Sequence[RankTrace]) -> dict[int, tuple[Event, ...]]:
    """The traces, and those of the other stages of the first one's pipeline."""
    config = job.config
    found = {t.rank: t.events for t in traces}
    contents = [stage_contents(model, config, stage) for stage in range(config.pp)]
    layout = rank_layout(config)
    pipeline = [int(r) for r in layout.group_of(traces[0].rank, "pp")]
    missing = [r for stage, r in enumerate(pipeline) if r not in found]
    if not missing:
        return found
    ran = {contents[t.coordinate["pp"]] for t in traces}
    if any(contents[pipeline.index(r)] not in ran for r in missing):
        return found  # ranks were chosen by hand and leave out a kind of stage
    try:
        composer = Composer(pipeline_schedule(config), layout, contents, traces)
        return found | {rank: composer.compose(rank) for rank in missing}
    except CompositionError:
        return found | {t.rank: t.events for t in trace_ranks(job, missing)}
