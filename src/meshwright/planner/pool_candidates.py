"""The units of a pool: the smallest groups of GPUs that serve by themselves, in every size that leaves a GPU over.

In: model, cluster, constraints. Out: `Candidates`, one row per unit: tp x pp of a dense model; of a mixture of experts
also dp replicas that spread their experts over all their ranks, as vLLM does.
"""

from __future__ import annotations

import numpy as np

from meshwright.cost.candidates import BoolArray, Candidates
from meshwright.hardware.spec import Cluster
from meshwright.models.spec import ModelSpec, MoeMlp
from meshwright.planner.constraints import Constraints
from meshwright.planner.legality import legal
from meshwright.planner.serving import as_candidates
from meshwright.planner.table import column, divisors, keep, product


def pool_candidates(model: ModelSpec, cluster: Cluster, fixed: Constraints) -> Candidates:
    """Every legal unit of fewer GPUs than the cluster has."""
    sizes = divisors(cluster.gpus)
    experts = max((k.mlp.experts for k in model.kinds if isinstance(k.mlp, MoeMlp)), default=1)
    table = product(
        tp=column(fixed.values("tp", [t for t in divisors(cluster.domain) if t <= cluster.domain])),
        pp=column(fixed.values("pp", [p for p in sizes if p <= model.num_layers])),
        dp=column(sizes if experts > 1 else [1]),
        spread=column([0, 1] if experts > 1 else [0]),
    )
    table = keep(table, table["tp"] * table["pp"] * table["dp"] < cluster.gpus)
    spread = table.pop("spread") == 1
    ranks = table["tp"] * table["dp"]
    table["ep"] = np.where(spread, ranks, 1)
    table["expert_tp"] = np.where(spread | (experts == 1), 1, table["tp"])
    # experts that are cut by tp are shared by no other replica: those are units of their own
    sensible: BoolArray = (spread & (ranks > 1) & (experts % ranks == 0)) | (~spread & (table["dp"] == 1))
    allowed = np.isin(table["ep"], column(fixed.values("ep", [int(e) for e in np.unique(table["ep"])])))
    candidates = as_candidates(keep(table, sensible & allowed), fixed.precision)
    return candidates.take(legal(model, None, 2, candidates))
