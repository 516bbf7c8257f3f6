"""What every exporter reads: the plan, its model with the values of its config.json, and the machines.

In: a `Plan`. Out: `ExportJob`, and the one form of a refusal.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from meshwright.errors import InputError
from meshwright.hardware import Cluster
from meshwright.layout.config import HybridParallelConfig
from meshwright.models import ModelSpec, catalogue
from meshwright.models.from_config import read_config
from meshwright.plan import Plan, ServingWorkload, TrainingRun, TrainingWorkload


@dataclass(frozen=True)
class Exported:
    """The text to write, and what it leaves to the user."""

    text: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportJob:
    """A training plan with everything that it names."""

    plan: Plan
    plan_file: str
    config: HybridParallelConfig
    workload: TrainingWorkload
    model: ModelSpec
    cluster: Cluster

    @property
    def run(self) -> TrainingRun:
        return self.plan.training or TrainingRun()

    @property
    def heading(self) -> str:
        """The plan in one line, for a comment."""
        c = self.config
        sizes = [f"{axis} {getattr(c, axis)}" for axis in ("dp", "pp", "cp", "tp", "ep") if getattr(c, axis) > 1]
        return f"{self.model.name}: {' x '.join(sizes) or 'one rank'} = {c.world_size} ranks, made by meshwright export"

    def values(self) -> dict[str, Any]:
        """The language model's part of its config.json."""
        values = _config_values(self.plan)
        inner = values.get("text_config")
        return cast("dict[str, Any]", inner) if isinstance(inner, dict) else values


def export_job(plan: Plan, plan_file: str) -> ExportJob:
    """The job of a plan that trains and names its machines."""
    if isinstance(plan.workload, ServingWorkload):
        raise InputError("this is a plan for serving; only --to vllm takes it")
    cluster = plan.load_cluster()
    if cluster.gpus != plan.parallel.world_size:
        raise InputError(
            f"the plan splits over {plan.parallel.world_size} ranks, but its cluster has {cluster.gpus} GPUs; make "
            "them equal (meshwright estimate plan.yaml --gpus N -o plan.yaml)"
        )
    return ExportJob(plan, plan_file, plan.parallel, plan.workload, plan.load_model(), cluster)


def refuse(target: str, what: str, instead: str) -> InputError:
    """The error of a plan that `target` cannot express."""
    return InputError(f"{target} cannot run this plan: {what}; {instead}")


def _config_values(plan: Plan) -> dict[str, Any]:
    if plan.model.config is not None:
        return dict(plan.model.config)
    name = plan.model.name
    for entry in catalogue():
        if name.lower() in {key.lower() for key in (entry.name, *entry.aliases, *entry.hub_ids)}:
            return dict(read_config(entry.config_file))
    return dict(read_config(Path(name).expanduser()))
