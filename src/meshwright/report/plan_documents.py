"""The JSON document of a search: `plans[]`, `search{}` and the reasons beside them. In: planner results. Out: dicts."""

from __future__ import annotations

from typing import Any

from meshwright.cost.workload import Workload
from meshwright.hardware import Cluster
from meshwright.models import ModelSpec
from meshwright.planner.explained import Explanation
from meshwright.planner.search import FrontPoint, SearchResult
from meshwright.planner.shortfall import Shortfall
from meshwright.report.json_documents import config_document, estimate_document, plain

Document = dict[str, Any]


def search_document(
    model: ModelSpec, cluster: Cluster, workload: Workload, found: SearchResult, why: Explanation
) -> Document:
    """`plans[]` best first, each with its reason; what was searched; the rule of thumb; the Pareto front; changes."""
    sentences = [why.bound.sentence, *(reason.sentence for reason in why.reasons)]
    plans = [
        {**estimate_document(plan), "reason": sentence} for plan, sentence in zip(found.best, sentences, strict=True)
    ]
    thumb = found.rule_of_thumb
    return {
        **question_document(model, cluster, workload, found),
        "plans": plans,
        "search": counts_document(found),
        "bound": plain(why.bound),
        "rule_of_thumb": None if thumb is None else estimate_document(thumb),
        "gain_over_rule_of_thumb": plain(found.gain),
        "fewest_gpus": None
        if found.fewest is None
        else {
            "gpus": found.fewest.config.world_size,
            "config": config_document(found.fewest.config),
            "memory_bytes": found.fewest.memory_bytes,
            "capacity_bytes": found.fewest.capacity_bytes,
        },
        "changes": [{**plain(change), "config": config_document(change.config)} for change in why.changes],
        "pareto": [_front_point(point) for point in found.pareto],
        "notes": list(found.notes),
    }


def nothing_fits_document(
    model: ModelSpec, cluster: Cluster, workload: Workload, found: SearchResult, missing: Shortfall
) -> Document:
    """The same document with no plans: by how much the smallest misses, and what would fit."""
    nearest = missing.nearest
    return {
        **question_document(model, cluster, workload, found),
        "plans": [],
        "search": counts_document(found),
        "nothing_fits": {
            "sentence": missing.sentence,
            "nearest": None
            if nearest is None
            else {
                "config": config_document(nearest.config),
                "memory_bytes": nearest.memory_bytes,
                "capacity_bytes": nearest.capacity_bytes,
                "missing_bytes": nearest.missing_bytes,
            },
            "remedies": [
                {"sentence": remedy.sentence, "gpus": remedy.gpus, "config": config_document(remedy.config)}
                for remedy in missing.remedies
            ],
        },
        "notes": list(found.notes),
    }


def question_document(model: ModelSpec, cluster: Cluster, workload: Workload, found: SearchResult) -> Document:
    """What was asked."""
    return {
        "model": {"name": model.name, "parameters": model.parameters, "layers": model.num_layers},
        "cluster": {"name": cluster.name, "accelerator": cluster.accelerator.name, "nodes": cluster.nodes,
                    "gpus_per_node": cluster.gpus_per_node, "gpus": cluster.gpus},
        "workload": {**plain(workload), "global_batch": found.global_batch},
        "objective": found.objective.value,
    }  # fmt: skip


def counts_document(found: SearchResult) -> Document:
    counts = found.counts
    return {"evaluated": counts.evaluated, "feasible": counts.feasible, "seconds": counts.seconds,
            "enumerated": counts.enumerated}  # fmt: skip


def _front_point(point: FrontPoint) -> Document:
    return {**plain(point), "config": config_document(point.config)}
