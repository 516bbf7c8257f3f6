"""Exploring a space: every configuration evaluated in chunks of bounded memory; what survives is what could be chosen.

In: a `Space`. Out: the Pareto front of every mesh among the configurations that fit, and how much was searched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from meshwright.cost.candidates import BoolArray
from meshwright.cost.estimate import Evaluation
from meshwright.cost.evaluate import evaluate
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
    """How much was searched: legal configurations; those priced one by one (the others have a lower bound on their step
    that rules them out); those of the priced that fit; and seconds."""

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
    """Evaluate a space, the most promising frames first, until the bound rules the rest out."""
    start = perf_counter()
    bounds = step_lower_bounds(model, cluster, workload, configurations, stack)
    order = np.argsort(bounds, kind="stable")
    ordered, bounds = configurations.take(order), bounds[order]
    limit = (1.0 - headroom) * cluster.accelerator.memory_bytes
    done, fitting, best_s = 0, 0, np.inf
    parts: list[Survivors] = []
    brim: list[Survivors] = []
    for first, chunk in ordered.chunks(chunk_rows):
        if bounds[first] > best_s / SLOWEST_SHARE:
            break
        result = evaluate(model, cluster, workload, chunk, stack=stack, prune=True)
        done += len(chunk)
        fitting += int(np.count_nonzero(result.fits))
        roomy = result.fits & (result.memory_bytes <= limit)
        best_s = min(best_s, float(result.step_s[roomy].min(initial=np.inf)))
        if np.isinf(best_s):
            brim.append(_fronts_of(result, result.fits))
        else:
            parts.append(_fronts_of(result, roomy & (result.step_s <= best_s / SLOWEST_SHARE)))
        if progress is not None and perf_counter() - start > PROGRESS_AFTER_S:
            progress(done, len(configurations))
    counts = SearchCounts(len(configurations), done, fitting, perf_counter() - start)
    return Exploration(_merged(parts or brim), not parts, counts)


def _fronts_of(result: Evaluation, rows: BoolArray) -> Survivors:
    chosen = np.flatnonzero(rows)
    kept = Survivors(result.candidates.take(chosen), result.step_s[chosen], result.memory_bytes[chosen])
    return fronts(kept, mesh_ids(kept.candidates))


def _merged(parts: list[Survivors]) -> Survivors:
    everything = joined(parts)
    kept = everything.take(everything.step_s <= everything.step_s.min(initial=np.inf) / SLOWEST_SHARE)
    return fronts(kept, mesh_ids(kept.candidates))
