"""Exploring a space: every configuration evaluated in chunks of bounded memory; what survives is what could be chosen.

In: a `Space`. Out: the Pareto front of every mesh among the configurations that fit, and how much was searched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from meshwright.cost.evaluate import evaluate
from meshwright.cost.stack import Stack
from meshwright.cost.workload import Workload
from meshwright.hardware.spec import Cluster
from meshwright.models.spec import ModelSpec
from meshwright.planner.bound import step_lower_bounds
from meshwright.planner.enumerate import CHUNK_ROWS, Space
from meshwright.planner.front import Survivors, feasible, fronts, joined, mesh_ids

Progress = Callable[[int, int], None]
"""Called with (configurations done, configurations in all) once a search has run for PROGRESS_AFTER_S."""

PROGRESS_AFTER_S = 2.0
SLOWEST_SHARE = 0.7
"""Plans slower than this share of the best speed are neither ranked nor on the Pareto front."""


@dataclass(frozen=True)
class SearchCounts:
    """How much was searched: legal configurations; those priced one by one (the others have a lower bound on their step
    that rules them out); those of the priced that fit; and seconds."""

    enumerated: int
    evaluated: int
    feasible: int
    seconds: float


def explore(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    configurations: Space,
    stack: Stack,
    progress: Progress | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[Survivors, SearchCounts]:
    """The Pareto front of every mesh among the configurations that fit, no slower than SLOWEST_SHARE of the best."""
    start = perf_counter()
    bounds = step_lower_bounds(model, cluster, workload, configurations, stack)
    order = np.argsort(bounds, kind="stable")
    ordered, bounds = configurations.take(order), bounds[order]
    done, fitting, best_s = 0, 0, np.inf
    parts: list[Survivors] = []
    for first, chunk in ordered.chunks(chunk_rows):
        if bounds[first] > best_s / SLOWEST_SHARE:
            break
        result = evaluate(model, cluster, workload, chunk, stack=stack, prune=True)
        done += len(chunk)
        fitting += int(np.count_nonzero(result.fits))
        best_s = min(best_s, float(result.step_s[result.fits].min(initial=np.inf)))
        kept = feasible(result, best_s / SLOWEST_SHARE)
        parts.append(fronts(kept, mesh_ids(kept.candidates)))
        if progress is not None and perf_counter() - start > PROGRESS_AFTER_S:
            progress(done, len(configurations))
    return _merge(parts, best_s), SearchCounts(len(configurations), done, fitting, perf_counter() - start)


def _merge(parts: list[Survivors], best_s: float) -> Survivors:
    everything = joined(parts)
    kept = everything.take(everything.step_s <= best_s / SLOWEST_SHARE)
    return fronts(kept, mesh_ids(kept.candidates))
