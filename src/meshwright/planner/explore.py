"""Exploring a space: every configuration evaluated in chunks of bounded memory; what survives is what could be chosen.

In: a `Space`. Out: the Pareto front of every mesh among the configurations that fit, and how much was searched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from meshwright.cost.candidates import BoolArray, Chunk, IntArray
from meshwright.cost.evaluate import Screening, screen
from meshwright.cost.memory_peak import peak_bytes
from meshwright.cost.stack import Stack
from meshwright.cost.workload import Workload
from meshwright.hardware.spec import Cluster
from meshwright.models.spec import ModelSpec
from meshwright.planner.bound import step_lower_bounds
from meshwright.planner.enumerate import CHUNK_ROWS, Space
from meshwright.planner.front import Survivors, fronts, joined, mesh_ids

Progress = Callable[[int, int], None]
"""Called with (configurations done, configurations in all) once a search has run for PROGRESS_AFTER_S."""

PROGRESS_AFTER_S = 2.0
SLOWEST_SHARE = 0.7
"""Plans slower than this share of the best speed are neither ranked nor on the Pareto front."""
HEADROOM = 0.05
"""Share of a device's memory that a plan leaves free where any plan can: about the memory model's own error on
published runs (docs/accuracy.md)."""


@dataclass(frozen=True)
class SearchCounts:
    """How much was searched: legal configurations; those priced one by one (a lower bound on their step or their
    memory rules the others out); those of the priced that fit; and seconds."""

    enumerated: int
    evaluated: int
    feasible: int
    seconds: float


@dataclass(frozen=True)
class Exploration:
    """What a space holds: the Pareto front of every mesh among the configurations that fit, no slower than
    SLOWEST_SHARE of the best. `tight`: none leaves the headroom asked for, so these fill the memory to the brim."""

    survivors: Survivors
    tight: bool
    counts: SearchCounts


@dataclass
class _Tally:
    """What has been found so far: survivors that leave headroom, and, until there are any, those that do not."""

    limit_bytes: float
    best_s: float = np.inf
    priced: int = 0
    fitting: int = 0
    roomy: list[Survivors] = field(default_factory=list[Survivors])
    brim: list[Survivors] = field(default_factory=list[Survivors])

    @property
    def cutoff_s(self) -> float:
        """Steps beyond this are too slow to be chosen."""
        return self.best_s / SLOWEST_SHARE

    def add(self, result: Screening) -> None:
        self.priced += len(result.fits)
        self.fitting += int(np.count_nonzero(result.fits))
        roomy = result.fits & (result.memory_bytes <= self.limit_bytes)
        self.best_s = min(self.best_s, float(result.step_s[roomy].min(initial=np.inf)))
        if np.isinf(self.best_s):
            self.brim.append(_fronts_of(result, result.fits))
        else:
            self.roomy.append(_fronts_of(result, roomy & (result.step_s <= self.cutoff_s)))


def explore(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    configurations: Space,
    stack: Stack,
    progress: Progress | None = None,
    chunk_rows: int = CHUNK_ROWS,
    headroom: float = HEADROOM,
) -> Exploration:
    """Evaluate a space, the most promising frames first, until the bound rules the rest out. Block by block of frames
    with their schedules, the lean states tell which fit at all; the others are not expanded."""
    start = perf_counter()
    by_schedule = configurations.by_schedule()
    bounds = step_lower_bounds(model, cluster, workload, by_schedule, stack)
    order = np.argsort(bounds, kind="stable")
    ordered, bounds = by_schedule.take(order), bounds[order]
    tally = _Tally((1.0 - headroom) * cluster.accelerator.memory_bytes)
    for block in _blocks(ordered.lean, chunk_rows):
        if bounds[block[0]] > tally.cutoff_s:
            break
        lean = ordered.lean.take(block)
        fit = _frames_that_fit(model, cluster, workload, lean, stack)
        tally.priced += int(lean.counts[~fit].sum())
        fitting = block[fit]
        for first, chunk in ordered.take(fitting).chunks(chunk_rows):
            if bounds[fitting[first]] > tally.cutoff_s:
                break
            tally.add(screen(model, cluster, workload, chunk, stack))
            if progress is not None and perf_counter() - start > PROGRESS_AFTER_S:
                progress(int(ordered.counts[: fitting[first] + 1].sum()), len(configurations))
    counts = SearchCounts(len(configurations), tally.priced, tally.fitting, perf_counter() - start)
    found = tally.roomy or tally.brim or [_nothing(configurations)]
    return Exploration(_merged(found), not tally.roomy, counts)


def _blocks(lean: Space, chunk_rows: int) -> Iterator[IntArray]:
    """Runs of frames with about `chunk_rows` lean configurations."""
    ends = np.cumsum(lean.counts)
    start = 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + chunk_rows, side="right")))
        yield np.arange(start, stop)
        start = stop


def _frames_that_fit(model: ModelSpec, cluster: Cluster, workload: Workload, lean: Space, stack: Stack) -> BoolArray:
    """Which frames have a lean configuration that fits."""
    fits = [
        peak_bytes(model, cluster, workload, Chunk.of(chunk), stack) <= cluster.accelerator.memory_bytes
        for _, chunk in lean.chunks(len(lean))
    ]
    frame = np.repeat(np.arange(len(lean.counts)), lean.counts)
    return np.bincount(frame[np.concatenate(fits)], minlength=len(lean.counts)) > 0


def _nothing(configurations: Space) -> Survivors:
    """No configuration, in the space's form."""
    _, chunk = next(configurations.chunks(1))
    empty = np.zeros(0, dtype=np.float64)
    return Survivors(chunk.take(np.zeros(0, dtype=np.int64)), empty, empty)


def _fronts_of(result: Screening, rows: BoolArray) -> Survivors:
    chosen = np.flatnonzero(rows)
    kept = Survivors(result.candidates.take(chosen), result.step_s[chosen], result.memory_bytes[chosen])
    return fronts(kept, mesh_ids(kept.candidates))


def _merged(parts: list[Survivors]) -> Survivors:
    everything = joined(parts)
    kept = everything.take(everything.step_s <= everything.step_s.min(initial=np.inf) / SLOWEST_SHARE)
    return fronts(kept, mesh_ids(kept.candidates))
