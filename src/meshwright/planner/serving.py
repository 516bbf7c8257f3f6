"""Serving plans: how to cut a model over GPUs so that it answers many users, or one user fast.

In: model, cluster, requests (`ServingWorkload` with its latency targets), objective. Out: `ServingResult`: the best
splits in full, the Pareto front of speed per user against speed per GPU over all splits and batch sizes, the rule of
thumb (smallest tp that fits within the fast domain, the rest replicas) and what the search gained over it.

Objectives: `throughput` is output tokens/s per GPU within the targets; `latency` the least time per output token (or to
the first token) of a lone request; `memory` the fewest GPUs that together hold the model, within the targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import numpy as np

from meshwright.cost.candidates import SCHEDULES, Candidates, FloatArray, IntArray
from meshwright.cost.serving import ServingArrays, ServingEstimate, serve_arrays, serve_estimate
from meshwright.cost.serving_stack import ServingStack
from meshwright.cost.workload import ServingWorkload
from meshwright.errors import InputError
from meshwright.hardware.load import resize
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import HybridParallelConfig, Precision, Schedule
from meshwright.models.spec import ModelSpec, MoeMlp
from meshwright.planner.constraints import Constraints
from meshwright.planner.legality import legal
from meshwright.planner.objectives import Objective
from meshwright.planner.search import SearchCounts
from meshwright.planner.table import Table, column, divisors, join, keep, product, rows

LatencyMetric = Literal["tpot", "ttft"]
MOST_GPUS = 4096


@dataclass(frozen=True)
class ServingPoint:
    """A split at one batch size: nothing else is faster both for the user and per GPU."""

    config: HybridParallelConfig
    sequences: int
    tokens_per_s_per_user: float
    tokens_per_s_per_gpu: float
    ttft_s: float


@dataclass(frozen=True)
class ServingShortfall:
    """Nothing fits, or nothing keeps the targets: what comes nearest, and the GPUs that would hold the model."""

    sentence: str
    nearest: ServingEstimate
    fewest_gpus: int | None


@dataclass(frozen=True)
class ServingResult:
    """What a search found; `best` is empty where nothing fits within the targets, then `shortfall` says why. `reasons`
    has a sentence per plan. `gain` is the objective's value over the rule of thumb's (1.2: a fifth better)."""

    objective: Objective
    gpus: int
    best: tuple[ServingEstimate, ...]
    reasons: tuple[str, ...]
    pareto: tuple[ServingPoint, ...]
    rule_of_thumb: ServingEstimate | None
    gain: float | None
    shortfall: ServingShortfall | None
    counts: SearchCounts


def serving_search(
    model: ModelSpec,
    cluster: Cluster,
    workload: ServingWorkload,
    objective: Objective = Objective.THROUGHPUT,
    top: int = 10,
    constraints: Constraints | None = None,
    stack: ServingStack | None = None,
    latency_metric: LatencyMetric = "tpot",
) -> ServingResult:
    """The best `top` ways to serve on all GPUs of the cluster."""
    start = perf_counter()
    fixed = constraints or Constraints()
    candidates = serving_candidates(model, cluster, fixed)
    if len(candidates) == 0:
        raise InputError(
            f"no split of {cluster.gpus} GPUs into tp x pp replicas is legal here; try --tp 1, or a number of GPUs "
            f"that {model.num_layers} layers and the attention heads share a divisor with"
        )
    alone = np.ones(len(candidates)) if objective is Objective.LATENCY else None
    arrays = serve_arrays(model, cluster, workload, candidates, alone, stack)
    order = _ranked(candidates, arrays, objective, latency_metric)
    batch = None if alone is None else 1
    best = tuple(serve_estimate(model, cluster, workload, candidates.config(int(r)), batch, stack) for r in order[:top])
    thumb_row = _rule_of_thumb(candidates, arrays, cluster)
    thumb = (
        None
        if thumb_row is None
        else serve_estimate(model, cluster, workload, candidates.config(thumb_row), batch, stack)
    )
    gain = None
    if best and thumb is not None:
        gain = _value(best[0], objective, latency_metric) / _value(thumb, objective, latency_metric)
    front, evaluated = _pareto(model, cluster, workload, candidates, arrays, stack)
    fitting = int(np.count_nonzero(arrays.fits))
    return ServingResult(
        objective=objective,
        gpus=cluster.gpus,
        best=best,
        reasons=tuple(_reason(best[0], other, objective, latency_metric) for other in best),
        pareto=front,
        rule_of_thumb=thumb,
        gain=gain,
        shortfall=None if best else _shortfall(model, cluster, workload, candidates, arrays, fixed, stack),
        counts=SearchCounts(len(candidates), len(candidates) + evaluated, fitting, perf_counter() - start),
    )


def serving_candidates(model: ModelSpec, cluster: Cluster, fixed: Constraints) -> Candidates:
    """tp within the fast domain x pp x dp replicas on all GPUs; experts over ep, or cut by tp where ep is 1."""
    gpus = cluster.gpus
    sizes = divisors(gpus)
    table = product(
        tp=column(fixed.values("tp", [t for t in sizes if t <= cluster.domain])),
        pp=column(fixed.values("pp", [p for p in sizes if p <= model.num_layers])),
    )
    replica = table["tp"] * table["pp"]
    table = keep(table, (replica <= gpus) & (gpus % np.maximum(replica, 1) == 0))
    table["dp"] = gpus // (table["tp"] * table["pp"])
    if fixed.dp is not None:
        table = keep(table, np.isin(table["dp"], column(fixed.dp)))
    experts = max((k.mlp.experts for k in model.kinds if isinstance(k.mlp, MoeMlp)), default=1)

    def spread(ranks: int) -> Table:
        return {"ep": column(fixed.values("ep", [e for e in divisors(ranks) if experts % e == 0]))}

    table = join(table, table["dp"] * table["tp"], spread)
    table["expert_tp"] = np.where((table["ep"] == 1) & (experts > 1), table["tp"], 1)
    candidates = as_candidates(table, fixed.precision)
    # a sequence of any even length: serving cuts no sequence
    return candidates.take(legal(model, cluster, 2, candidates))


def as_candidates(table: Table, precision: Precision) -> Candidates:
    one: IntArray = np.ones(rows(table), dtype=np.int64)
    return Candidates(
        dp=table["dp"],
        tp=table["tp"],
        pp=table["pp"],
        cp=one,
        ep=table["ep"],
        expert_tp=table["expert_tp"],
        vpp=one,
        sequence_parallel=one == 0,
        micro_batch=one,
        global_batch=table["dp"],
        schedule=one * SCHEDULES.index(Schedule.ONE_F_ONE_B),
        zero=0 * one,
        zero_shards=table["dp"],
        recompute=0 * one,
        recompute_every=one,
        heads_exchanged=one == 0,
        precision=precision,
        splits=None,
    )


def _ranked(candidates: Candidates, arrays: ServingArrays, objective: Objective, metric: LatencyMetric) -> IntArray:
    """Rows that keep the targets, best first; equals by fewer GPUs per replica, then less pipeline, then less ep."""
    holding = np.maximum(candidates.tp, candidates.ep * candidates.expert_tp) * candidates.pp
    simple = (candidates.ep, candidates.pp, holding)
    if objective is Objective.LATENCY:
        pair = (arrays.ttft_s, arrays.tpot_s) if metric == "tpot" else (arrays.tpot_s, arrays.ttft_s)
        order = np.lexsort((*simple, *pair))
    elif objective is Objective.MEMORY:
        order = np.lexsort((*simple[:2], -arrays.tokens_per_s_per_gpu, holding))
    else:
        order = np.lexsort((*simple, -arrays.tokens_per_s_per_gpu))
    return order[arrays.meets_targets[order]]


def _rule_of_thumb(candidates: Candidates, arrays: ServingArrays, cluster: Cluster) -> int | None:
    """The smallest tp that fits within a node, then pipeline stages over nodes; experts over the smallest ep."""
    inside = candidates.tp <= cluster.gpus_per_node
    fitting = np.flatnonzero(arrays.fits & inside)
    if len(fitting) == 0:
        return None
    order = np.lexsort((candidates.ep[fitting], candidates.tp[fitting], candidates.pp[fitting]))
    return int(fitting[order[0]])


def _value(estimate: ServingEstimate, objective: Objective, metric: LatencyMetric) -> float:
    """What the objective maximises."""
    if objective is Objective.LATENCY:
        return 1.0 / (estimate.tpot_s if metric == "tpot" else estimate.ttft_s)
    if objective is Objective.MEMORY:
        return 1.0 / holding_gpus(estimate.config)
    return estimate.tokens_per_s_per_gpu


def holding_gpus(config: HybridParallelConfig) -> int:
    """GPUs that together hold the model once; experts spread over replicas couple these."""
    return max(config.tp, config.ep * config.expert_tp) * config.pp


def _reason(winner: ServingEstimate, other: ServingEstimate, objective: Objective, metric: LatencyMetric) -> str:
    """Why `other` ranks where it does, in words; for the winner, what bounds it."""
    if other is winner:
        held = f"{winner.sequences} sequences per replica"
        if objective is Objective.LATENCY:
            first = f"{winner.ttft_s * 1e3:.0f} ms to the first"
            return f"{winner.tpot_s * 1e3:.1f} ms per token and {first}, alone on a replica"
        why = "memory holds no more" if winner.sequences >= winner.max_sequences else "the target on time per token"
        return f"bound by {held}: {why}"
    share = _value(other, objective, metric) / _value(winner, objective, metric) - 1.0
    if objective is Objective.LATENCY:
        slower = (
            f"{other.tpot_s * 1e3:.1f} ms per token"
            if metric == "tpot"
            else f"{other.ttft_s * 1e3:.0f} ms to the first"
        )
        return f"{-share:.0%} slower: {slower}"
    if objective is Objective.MEMORY and holding_gpus(other.config) > holding_gpus(winner.config):
        return f"{holding_gpus(other.config)} GPUs hold the model instead of {holding_gpus(winner.config)}"
    rate = f"{other.tokens_per_s_per_gpu:.0f} tokens/s per GPU"
    per_gpu, best = (e.sequences / (e.config.tp * e.config.pp) for e in (other, winner))
    if per_gpu < 0.95 * best:
        few = 0 if per_gpu >= 10 else 1
        return f"{rate}: {per_gpu:.{few}f} sequences per GPU instead of {best:.{few}f}"
    return f"{rate}: {other.tpot_s * 1e3:.1f} ms per token instead of {winner.tpot_s * 1e3:.1f}"


def _pareto(
    model: ModelSpec,
    cluster: Cluster,
    workload: ServingWorkload,
    candidates: Candidates,
    arrays: ServingArrays,
    stack: ServingStack | None,
) -> tuple[tuple[ServingPoint, ...], int]:
    """Speed per user against speed per GPU over splits and batches (powers of two up to what fits), fastest user first,
    and the number of points priced."""
    fitting = np.flatnonzero(arrays.fits)
    if len(fitting) == 0:
        return (), 0
    most = np.maximum(arrays.max_sequences[fitting], 1.0)
    steps = np.floor(np.log2(most)).astype(np.int64) + 1
    row = np.repeat(fitting, steps)
    power = np.arange(len(row)) - np.repeat(np.cumsum(steps) - steps, steps)
    batch: FloatArray = np.exp2(power.astype(np.float64))
    some = candidates.take(row)
    priced = serve_arrays(model, cluster, workload, some, batch, stack)
    user, gpu = 1.0 / priced.tpot_s, priced.tokens_per_s_per_gpu
    order = np.lexsort((-gpu, -user))
    better = np.maximum.accumulate(gpu[order])
    chosen = order[np.concatenate([[True], gpu[order][1:] > better[:-1]])]
    points = [
        ServingPoint(some.config(int(i)), int(batch[i]), float(user[i]), float(gpu[i]), float(priced.ttft_s[i]))
        for i in chosen
    ]
    return tuple(points), len(row)


def _shortfall(
    model: ModelSpec,
    cluster: Cluster,
    workload: ServingWorkload,
    candidates: Candidates,
    arrays: ServingArrays,
    fixed: Constraints,
    stack: ServingStack | None,
) -> ServingShortfall:
    """Why no plan remains."""
    if arrays.fits.any():
        late = np.where(arrays.fits, arrays.ttft_s / (workload.ttft_s or np.inf), np.inf)
        slow = np.where(arrays.fits, arrays.tpot_s / (workload.tpot_s or np.inf), np.inf)
        row = int(np.argmin(np.maximum(late, slow)))
        nearest = serve_estimate(model, cluster, workload, candidates.config(row), None, stack)
        return ServingShortfall(
            f"it fits, but nothing keeps the targets: the nearest reaches {nearest.ttft_s * 1e3:.0f} ms to the first "
            f"token and {nearest.tpot_s * 1e3:.1f} ms per token",
            nearest,
            None,
        )
    need = arrays.weights_bytes + arrays.workspace_bytes + arrays.cache_bytes_per_sequence
    row = int(np.argmin(need))
    nearest = serve_estimate(model, cluster, workload, candidates.config(row), 1, stack)
    missing = (need[row] - cluster.usable_bytes) / 2**30
    fewest = _fewest_gpus(model, cluster, workload, fixed, stack)
    more = f"; {fewest} GPUs hold it" if fewest else ""
    needs = f"{need[row] / 2**30:.1f} GiB per GPU, {max(missing, 0.0):.1f} GiB too much"
    sentence = f"nothing fits: one sequence needs {needs}{more}"
    return ServingShortfall(sentence, nearest, fewest)


def _fewest_gpus(
    model: ModelSpec, cluster: Cluster, workload: ServingWorkload, fixed: Constraints, stack: ServingStack | None
) -> int | None:
    """The fewest GPUs, doubling from the cluster's, that hold one replica."""
    gpus = cluster.gpus * 2
    while gpus <= MOST_GPUS:
        grown = resize(cluster, gpus=gpus) if gpus % cluster.gpus_per_node == 0 else cluster
        candidates = serving_candidates(model, grown, fixed)
        if len(candidates) and serve_arrays(model, grown, workload, candidates, None, stack).fits.any():
            return gpus
        gpus *= 2
    return None


__all__ = ["ServingPoint", "ServingResult", "ServingShortfall", "serving_candidates", "serving_search"]
