"""Objectives: the order in which the configurations that fit are ranked.

`throughput` ranks by step time. `memory` asks for the most headroom among those that keep at least 90 % of the best
speed. `latency` is about serving (planner.serving): the command line refuses it for a training step, which would rank
by step time.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np

from meshwright.cost.candidates import IntArray
from meshwright.planner.front import Survivors, mesh_ids, quantised, simplicity

MEMORY_SPEED_SHARE = 0.9
"""Share of the best speed that a plan of objective `memory` must keep."""


class Objective(StrEnum):
    THROUGHPUT = "throughput"
    MEMORY = "memory"
    LATENCY = "latency"


def ranked(survivors: Survivors, objective: Objective) -> IntArray:
    """Rows in the order of the objective, best first; equals are ordered simplest first."""
    simple = simplicity(survivors.candidates)
    speed = quantised(survivors.step_s)
    if objective is Objective.MEMORY:
        slowest = survivors.step_s.min(initial=np.inf) / MEMORY_SPEED_SHARE
        rows = np.flatnonzero(survivors.step_s <= slowest)
        order = np.lexsort((simple[rows], speed[rows], survivors.memory_bytes[rows]))
        return rows[order]
    return np.lexsort((simple, survivors.memory_bytes, speed))


def best_of_each_mesh(survivors: Survivors, order: IntArray, count: int) -> IntArray:
    """The first `count` rows of an order that differ in their mesh: variants of one mesh would crowd out the rest."""
    meshes = mesh_ids(survivors.candidates)[order]
    _, first = np.unique(meshes, return_index=True)
    return order[np.sort(first)[:count]]


__all__ = ["MEMORY_SPEED_SHARE", "Objective", "best_of_each_mesh", "ranked"]
