"""A job: everything that an estimate needs, from options or from a plan file with options laid over it.

In: a MODEL or PLAN argument and the options given. Out: a `Job`; and back again, a `Plan` of a job and its estimate.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from meshwright.commands.inputs import load_cluster, load_model, load_stack, needed, reserved_bytes
from meshwright.cost.estimate import Estimate
from meshwright.cost.from_plan import workload_of
from meshwright.cost.stack import Stack, default_stack
from meshwright.cost.workload import Optimizer, Workload
from meshwright.errors import InputError
from meshwright.hardware import Cluster
from meshwright.layout.config import HybridParallelConfig
from meshwright.models import ModelSpec
from meshwright.plan import ClusterSection, EstimateSummary, ModelSection, Plan, ServingWorkload, TrainingWorkload


@dataclass(frozen=True)
class ClusterOptions:
    """--cluster and its companions, as given."""

    name: str | None = None
    nodes: int | None = None
    gpus: int | None = None
    gpus_per_node: int | None = None
    reserved_gib: float | None = None

    @property
    def resizes(self) -> bool:
        return self.name is not None or self.nodes is not None or self.gpus is not None

    def load(self, gpus: int | None = None) -> Cluster:
        """The cluster; `gpus` is its size where neither --nodes nor --gpus was given."""
        wanted = gpus if self.gpus is None and self.nodes is None else self.gpus
        return load_cluster(
            self.name,
            nodes=self.nodes,
            gpus=wanted,
            gpus_per_node=self.gpus_per_node,
            reserved_gib=self.reserved_gib,
        )


@dataclass(frozen=True)
class WorkloadOptions:
    """--seq and its companions, as given (None: not given)."""

    seq: int | None = None
    optimizer: Optimizer | None = None
    flash_attention: bool | None = None
    dropout: bool | None = None
    stack: str | None = None

    def over(self, base: Workload | None) -> Workload:
        """These options over a plan's workload, or over the defaults."""
        start = base or Workload(seq=needed("--seq", self.seq, 8192))
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "stack"}
        return replace(start, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Job:
    """Model, machine, workload and software; the sections that name them in a plan file."""

    model: ModelSpec
    cluster: Cluster
    workload: Workload
    stack: Stack
    model_section: ModelSection
    cluster_section: ClusterSection


def is_plan(text: str) -> bool:
    return text.lower().endswith((".yaml", ".yml"))


def job_of_model(name: str, cluster: ClusterOptions, workload: WorkloadOptions, gpus: int | None = None) -> Job:
    """A job from options alone; `gpus` is the cluster's size where no option says it."""
    spec = load_model(name)
    machine = cluster.load(gpus)
    return Job(
        spec,
        machine,
        workload.over(None),
        load_stack(workload.stack),
        ModelSection(name=name),
        section_of(cluster, machine),
    )


def job_of_plan(plan: Plan, cluster: ClusterOptions, workload: WorkloadOptions) -> Job:
    """The job of a plan file, with the options that were given laid over it."""
    if isinstance(plan.workload, ServingWorkload):
        raise InputError("this is a plan for serving; estimate it with the options of plan --serve")
    section = plan.cluster
    if cluster.resizes or section is None:
        named = replace(cluster, name=cluster.name or (section.name if section else None))
        machine = named.load(plan.parallel.world_size)
        section = section_of(named, machine)
    else:
        machine = plan.load_cluster()
        reserved = reserved_bytes(cluster.reserved_gib)
        if reserved is not None:
            machine, section = (
                replace(machine, reserved_bytes=reserved),
                section.model_copy(update={"reserved_bytes": reserved}),
            )
    software = workload.stack or plan.workload.stack
    return Job(
        plan.load_model(), machine, workload.over(workload_of(plan.workload)), load_stack(software), plan.model, section
    )


def section_of(options: ClusterOptions, cluster: Cluster) -> ClusterSection:
    """How a plan names this cluster: its size in nodes, and what was changed of it."""
    whole = options.gpus_per_node is None and options.gpus is not None and cluster.nodes == 1
    return ClusterSection(
        name=options.name or cluster.name,
        nodes=None if whole else cluster.nodes,
        gpus=cluster.gpus if whole else None,
        gpus_per_node=options.gpus_per_node,
        reserved_bytes=reserved_bytes(options.reserved_gib),
    )


def plan_of(job: Job, config: HybridParallelConfig, estimate: Estimate, objective: str | None = None) -> Plan:
    """The plan file of a job and its chosen configuration."""
    defaults, work = Workload(seq=job.workload.seq), job.workload
    changed = {
        f.name: getattr(work, f.name) for f in fields(Workload) if getattr(work, f.name) != getattr(defaults, f.name)
    }
    optimizer = changed.pop("optimizer", None)
    workload = TrainingWorkload(
        seq=work.seq,
        optimizer=None if optimizer is None else str(optimizer),
        stack=None if job.stack.name == default_stack().name else job.stack.name,
        **changed,
    )
    summary = EstimateSummary(
        step_s=estimate.time.step_s,
        peak_bytes=estimate.memory.peak.total_bytes,
        tokens_per_s_per_gpu=estimate.throughput.tokens_per_s_per_gpu,
        mfu=estimate.throughput.mfu,
    )
    return Plan.from_parts(
        job.model_section, config, workload, job.cluster_section, objective=objective, estimate=summary
    )
