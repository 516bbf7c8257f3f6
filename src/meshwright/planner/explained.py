"""A search result with its reasons: what bounds the winner, why each runner-up loses, which one change would help most.

In: the result of `search` and its question. Out: an `Explanation`.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.cost.stack import Stack
from meshwright.cost.workload import Workload
from meshwright.hardware.spec import Cluster
from meshwright.models.spec import ModelSpec
from meshwright.planner.changes import Change, changes
from meshwright.planner.constraints import Constraints
from meshwright.planner.explain import Bound, Reason, bound_of, why_not
from meshwright.planner.search import SearchResult


@dataclass(frozen=True)
class Explanation:
    """`reasons[i]` belongs to plan i + 1 of the result (the winner has its bound); `changes` most helpful first."""

    bound: Bound
    reasons: tuple[Reason, ...]
    changes: tuple[Change, ...]


def explained(
    result: SearchResult,
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    constraints: Constraints,
    stack: Stack,
) -> Explanation:
    """The reasons of a search that found a plan."""
    winner, *others = result.best
    return Explanation(
        bound=bound_of(winner, model, cluster),
        reasons=tuple(why_not(winner, other, model, cluster, result.objective) for other in others),
        changes=changes(model, cluster, workload, winner, constraints, stack),
    )
