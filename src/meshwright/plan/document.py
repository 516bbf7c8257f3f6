"""The plan: one small, versioned YAML file that says what was decided - model, cluster, workload, parallel config.

Every command reads or writes it. In: a file, or the parts. Out: a `Plan`, checked key by key: whatever is wrong in a
file (unknown key, wrong type, hostile YAML) is an InputError that names the place. Reading what was written gives an
equal plan.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import AfterValidator, BaseModel, ValidationError, model_validator

from meshwright import hardware, models
from meshwright.errors import InputError
from meshwright.files import write_named
from meshwright.hardware import Cluster
from meshwright.layout.config import HybridParallelConfig
from meshwright.models import ModelSpec
from meshwright.plan.sections import (
    AnyWorkload,
    ClusterSection,
    EstimateSummary,
    ModelSection,
    Parallel,
    Provenance,
    Section,
    ServingWorkload,
    TrainingRun,
    TrainingWorkload,
)
from meshwright.plan.wording import hint, short
from meshwright.plan.yaml_text import dump_yaml, load_yaml

VERSION = 1
"""Of the form of the file. A change that old readers would misread raises it."""


def _known_version(version: int) -> int:
    if version != VERSION:
        raise InputError(f"{short(version)} is not a version of plans that is understood; write version: {VERSION}")
    return version


class Plan(Section):
    """One job, decided. `model` and `cluster` may be written as a bare name."""

    version: Annotated[int, AfterValidator(_known_version)] = VERSION
    model: ModelSection
    cluster: ClusterSection | None = None
    workload: AnyWorkload
    parallel: Parallel
    training: TrainingRun | None = None
    provenance: Provenance | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare_names(cls, values: Any) -> Any:
        """`model: llama-3.1-8b` means `model: {name: llama-3.1-8b}`; a workload without kind is training."""
        if not isinstance(values, dict):
            return values
        table = dict(cast("dict[str, Any]", values))
        for key in ("model", "cluster"):
            if isinstance(table.get(key), str):
                table[key] = {"name": table[key]}
        workload = table.get("workload")
        if isinstance(workload, dict) and "kind" not in workload:
            table["workload"] = {"kind": "training", **cast("dict[str, Any]", workload)}
        return table

    @classmethod
    def from_parts(
        cls,
        model: str | ModelSection,
        parallel: HybridParallelConfig,
        workload: TrainingWorkload | ServingWorkload,
        cluster: str | ClusterSection | None = None,
        *,
        training: TrainingRun | None = None,
        objective: str | None = None,
        estimate: EstimateSummary | None = None,
    ) -> Plan:
        """A plan from its parts, marked with this version of meshwright."""
        return cls(
            model=ModelSection(name=model) if isinstance(model, str) else model,
            cluster=ClusterSection(name=cluster) if isinstance(cluster, str) else cluster,
            workload=workload,
            parallel=parallel,
            training=training,
            provenance=Provenance(meshwright=version("meshwright"), objective=objective, estimate=estimate),
        )

    @classmethod
    def from_yaml(cls, text: str, origin: str = "plan") -> Plan:
        """The plan in a YAML text; `origin` names it in errors."""
        values = load_yaml(text, origin)
        try:
            plan = cls.model_validate(values)
        except ValidationError as error:
            raise InputError(f"{origin}: {_first_problem(error, cls)}") from None
        if plan.model.config is not None:
            _as_json(plan.model.config, f"{origin}: model.config")
        return plan

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Plan:
        """The plan in a file."""
        return cls.from_yaml(_text_of(Path(path)), str(path))

    def to_yaml(self) -> str:
        return dump_yaml(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON-like values, unset keys left out."""
        return _without_none(self.model_dump(mode="python"))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file whole or not at all."""
        write_named(Path(path), self.to_yaml(), "plan.yaml")

    def digest(self) -> str:
        """SHA-256 over what must agree between ranks: model, workload, parallel config and training options.

        Where the model's config stands in the plan, that is what counts, not its name.
        """
        content = self.to_dict()
        agreed = {key: content[key] for key in ("version", "workload", "parallel", "training") if key in content}
        agreed["model"] = content["model"].get("config") or content["model"]["name"]
        return hashlib.sha256(_as_json(agreed, "plan").encode()).hexdigest()

    def load_model(self) -> ModelSpec:
        """The model that the plan names or holds."""
        if self.model.config is not None:
            return replace(models.ModelSpec.from_config(self.model.config), name=self.model.name)
        return models.load(self.model.name)

    def load_cluster(self) -> Cluster:
        """The cluster that the plan names, in its size: the parallel config's world unless the plan says another."""
        section = self.cluster
        if section is None:
            raise InputError("the plan names no cluster; add one, like cluster: {name: h100-sxm, nodes: 8}")
        gpus = section.gpus
        if gpus is None and section.nodes is None:
            gpus = self.parallel.world_size
        return hardware.load(
            section.name,
            nodes=section.nodes,
            gpus=gpus,
            gpus_per_node=section.gpus_per_node,
            reserved_bytes=section.reserved_bytes,
            oversubscription=section.oversubscription,
        )


MAX_PLAN_BYTES = 1 << 20


def _text_of(path: Path) -> str:
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        if path.stat().st_size > MAX_PLAN_BYTES:
            raise InputError(f"{path}: larger than {MAX_PLAN_BYTES >> 20} MiB, not a plan")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(path)!r}: not a path ({error})") from None


def _without_none(value: Any) -> Any:
    """Sections without their unset keys. The model's own config is left as it is: there null means something."""
    if not isinstance(value, dict):
        return value
    table = cast("dict[str, Any]", value)
    return {k: v if k == "config" else _without_none(v) for k, v in table.items() if v is not None}


def _as_json(value: Any, where: str) -> str:
    """Canonical JSON of plain values; an InputError for what JSON cannot hold."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: only numbers, text, lists and mappings with text keys may stand here") from error


def _first_problem(error: ValidationError, kind: type[BaseModel]) -> str:
    """The problem to mend first (a key that is not known explains one that is missing), in one line."""
    problems = error.errors()
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    loc = [str(part) for part in problem["loc"]]
    serving = loc[:2] == ["workload", "serving"]
    place = [loc[0], *loc[2:]] if loc[:1] == ["workload"] and loc[1:2] in (["training"], ["serving"]) else loc
    prefix = f"{'.'.join(place)}: " if place else ""
    if problem["type"] == "extra_forbidden":
        parent = f"{'.'.join(place[:-1])}: " if place[:-1] else ""
        return f"{parent}unknown key {short(place[-1])}{hint(place[-1], _keys_at(place[:-1], kind, serving))}"
    if problem["type"] == "missing":
        return f"{'.'.join(place)} is missing"
    if problem["type"] == "value_error":
        return f"{prefix}{problem.get('ctx', {}).get('error', problem['msg'])}"
    if problem["type"] == "union_tag_invalid":
        return f"{prefix}kind must be training or serving"
    return f"{prefix}{problem['msg'][0].lower()}{problem['msg'][1:]}, got {short(problem['input'])}"


def _keys_at(place: list[str], kind: type[BaseModel], serving: bool) -> list[str]:
    """The keys that a section knows."""
    by_section: dict[str, type[BaseModel]] = {
        "model": ModelSection,
        "cluster": ClusterSection,
        "workload": ServingWorkload if serving else TrainingWorkload,
        "training": TrainingRun,
        "provenance": Provenance,
        "estimate": EstimateSummary,
    }
    return list((by_section[place[-1]] if place else kind).model_fields)
