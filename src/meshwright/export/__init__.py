"""Room export: a plan as the input of another framework or launcher, in that program's own words.

In: a `Plan`. Out: `Exported` text. What a target cannot express is an InputError that names the reason and the nearest
plan that it can; what it leaves to the user's own script is a note. vLLM's arguments are made in `serving`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from meshwright.export.deepspeed import deepspeed
from meshwright.export.job import Exported, ExportJob, export_job
from meshwright.export.kubernetes import kubernetes
from meshwright.export.megatron import megatron
from meshwright.export.slurm import slurm
from meshwright.export.torchtitan import torchtitan
from meshwright.plan import Plan


class Target(StrEnum):
    """Where a training plan can go."""

    MEGATRON = "megatron"
    TORCHTITAN = "torchtitan"
    DEEPSPEED = "deepspeed"
    SLURM = "slurm"
    K8S = "k8s"


TARGETS: dict[Target, Callable[[ExportJob], Exported]] = {
    Target.MEGATRON: megatron,
    Target.TORCHTITAN: torchtitan,
    Target.DEEPSPEED: deepspeed,
    Target.SLURM: slurm,
    Target.K8S: kubernetes,
}


def export(plan: Plan, target: Target, plan_file: str = "plan.yaml") -> Exported:
    """The plan for `target`; `plan_file` is how launchers name the plan."""
    return TARGETS[target](export_job(plan, plan_file))


__all__ = ["Exported", "Target", "export"]
