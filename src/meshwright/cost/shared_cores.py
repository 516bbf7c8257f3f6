"""Steps of ranks that share a CPU's cores: more ranks on a node than cores take turns.

In: a priced step and the cluster. Out: the step, no shorter than the work of a node's ranks over its cores. A rank that
waits (bubble) leaves its core to the others, one that sends or receives does not: on one machine copying is the cores'
own work. A work-conserving scheduler needs at least max(longest path, work / cores) (Graham 1969), which is what is
taken.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from meshwright.cost.candidates import Candidates
from meshwright.cost.step import StepArrays
from meshwright.hardware.spec import Cluster


def taking_turns(step: StepArrays, candidates: Candidates, cluster: Cluster) -> StepArrays:
    """The step where `cluster.shared_cores` are fewer than the ranks of a node; unchanged elsewhere.

    Where the cores are what limits, all parts are longer by ranks / cores and nothing is idle: no bubble is left.
    """
    if cluster.shared_cores is None:
        return step
    ranks = np.minimum(candidates.world, cluster.gpus_per_node)
    turns = np.maximum(ranks / cluster.shared_cores, 1.0)
    busy = step.step_s - step.parts_s["bubble"]
    limited = busy * turns > step.step_s
    longer = np.where(limited, turns, 1.0)
    parts = {name: seconds * longer for name, seconds in step.parts_s.items()}
    parts["bubble"] = np.where(limited, 0.0, step.parts_s["bubble"])
    return replace(step, parts_s=parts, step_s=np.where(limited, busy * turns, step.step_s))
