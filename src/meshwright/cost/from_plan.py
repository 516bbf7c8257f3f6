"""The cost model's workloads from a plan's sections: what a section leaves out keeps the cost model's default."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from meshwright import plan
from meshwright.cost.workload import WEIGHT_FORMAT_BYTES, Optimizer, ServingWorkload, Workload
from meshwright.errors import InputError, suggestion


def workload_of(section: plan.TrainingWorkload) -> Workload:
    """The training workload of a plan."""
    optimizer = section.optimizer
    if optimizer is not None and optimizer not in set(Optimizer):
        hint = suggestion(optimizer, list(Optimizer)) or f"; known: {', '.join(Optimizer)}"
        raise InputError(f"workload.optimizer: unknown optimizer {optimizer!r}{hint}")
    given = {
        "optimizer": None if optimizer is None else Optimizer(optimizer),
        "gradient_bytes": section.gradient_bytes,
        "flash_attention": section.flash_attention,
        "dropout": section.dropout,
        "capacity_factor": section.capacity_factor,
    }
    return replace(Workload(seq=section.seq), **{name: value for name, value in given.items() if value is not None})


def serving_workload_of(section: plan.ServingWorkload) -> ServingWorkload:
    """The serving workload of a plan."""
    workload = ServingWorkload(
        prompt=section.prompt, output=section.output, ttft_s=section.ttft_s, tpot_s=section.tpot_s
    )
    given: dict[str, Any] = {
        "kv_bytes_per_element": section.kv_bytes_per_element,
        "weight_bytes": None if section.weight_format is None else WEIGHT_FORMAT_BYTES[section.weight_format],
        "prefix_hit_rate": section.prefix_hit_rate,
        "pass_tokens": section.pass_tokens,
    }
    return replace(workload, **{name: value for name, value in given.items() if value is not None})
