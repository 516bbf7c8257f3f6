"""The cost model's workloads from a plan's sections: what a section leaves out keeps the cost model's default."""

from __future__ import annotations

from dataclasses import replace

from meshwright import plan
from meshwright.cost.workload import Optimizer, ServingWorkload, Workload
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
    if section.kv_bytes_per_element is None:
        return workload
    return replace(workload, kv_bytes_per_element=section.kv_bytes_per_element)
