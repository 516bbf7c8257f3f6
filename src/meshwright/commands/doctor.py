"""`meshwright doctor`: what is wrong with a plan or a run, and what would cure it. One function per complaint.

In: a run's folder or a plan file. Out: tables or one JSON document, edited plans with -o; exit code 1 where something
is wrong.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshwright.commands import output
from meshwright.commands.doctor_hang import hang
from meshwright.commands.options import Json
from meshwright.errors import InputError

if TYPE_CHECKING:
    from meshwright.hardware import Cluster
    from meshwright.measurements import LinkSamples
    from meshwright.plan import Plan

doctor = typer.Typer(
    name="doctor",
    help="What is wrong with a plan or a run, and what would cure it.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
)
doctor.command("hang")(hang)

RunOrPlan = Annotated[str, typer.Argument(metavar="RUN_DIR|PLAN", help="A run's folder (its --out), or a plan file.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's folder (the --out of train).")]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="The plan that was run, where the folder holds none.")]
ClusterName = Annotated[
    str | None, typer.Option("--cluster", help="Catalogue name or TOML file; default the plan's.", metavar="NAME|FILE")
]
PlanOut = Annotated[Path | None, typer.Option("--out", "-o", help="Write the best cure's plan here.", metavar="FILE")]


@doctor.command("oom")
def oom(
    target: RunOrPlan, plan: PlanFile = None, cluster: ClusterName = None, out: PlanOut = None, as_json: Json = False
) -> int:
    """Memory by rank and stage, the allocation that failed, and changes of the plan that fit, priced.

    Works on a plan that has not run, on a live or finished run's folder, and on what a killed run left. Exit code 1: it
    ran out of memory, or will.
    """
    from meshwright.commands.jobs import is_plan
    from meshwright.doctor.oom import diagnose_oom, diagnose_plan
    from meshwright.doctor.run_records import read_run
    from meshwright.plan import Plan
    from meshwright.report.doctor_documents import oom_document
    from meshwright.report.doctor_tables import oom_report

    if is_plan(target):
        document = Plan.read(target)
        report = diagnose_plan(document, _cluster(cluster, document))
    else:
        run, given = read_run(Path(target)), _given(plan)
        report = diagnose_oom(run, _cluster(cluster, given or run.plan), given)
    cure = next(iter(report.cures), None)
    if out is not None and cure is not None and cure.fits:
        report.plan_of(cure).write(out)
    output.show_json(oom_document(report)) if as_json else output.show(oom_report(report))
    if out is not None and not report.fits and (cure is None or not cure.fits):
        output.show(f"no change of this plan fits: {out} was not written", stderr=True)
    return 0 if report.fits else 1


@doctor.command("efficiency")
def efficiency(
    folder: RunFolder,
    plan: PlanFile = None,
    cluster: ClusterName = None,
    out: PlanOut = None,
    plot: Annotated[bool, typer.Option("--plot", help="The waterfall as bars too.")] = False,
    as_json: Json = False,
) -> int:
    """Where a run's time went: axes, bubble, balance, stragglers, links, MFU; the three changes that pay most."""
    from meshwright.doctor.efficiency import diagnose_efficiency
    from meshwright.doctor.run_records import read_run
    from meshwright.report.doctor_documents import efficiency_document
    from meshwright.report.doctor_tables import efficiency_report

    run, given = read_run(folder), _given(plan)
    report = diagnose_efficiency(run, _cluster(cluster, given or run.plan), given)
    better = next((c.config for c in report.changes if c.config is not None), None)
    if out is not None:
        if better is None:
            output.show(f"no change of this plan pays: {out} was not written", stderr=True)
        else:
            report.plan_of(better).write(out)
    output.show_json(efficiency_document(report)) if as_json else output.show(efficiency_report(report, plot))
    return 0


@doctor.command("links")
def links(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="A plan file: its groups are measured.")],
    pairs: Annotated[bool, typer.Option("--pairs", help="All pairs of ranks too.")] = False,
    cluster: ClusterName = None,
    cores: Annotated[
        float | None, typer.Option("--cores", help="Cores that a host's ranks share (CPU ranks).", min=0.01)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the measured cluster here.", metavar="FILE.toml")
    ] = None,
    as_json: Json = False,
) -> int:
    """Measure every collective of every axis by size on this job's own groups; find what is slow.

    Forks the ranks on this machine's CPU, or is one of them under torchrun. Exit code 1: a link is slow.
    """
    from meshwright.commands.runtime_room import needs_runtime
    from meshwright.doctor.cluster_file import write_cluster
    from meshwright.doctor.links import measured_cluster, report_links, shape_of
    from meshwright.plan import Plan
    from meshwright.report.doctor_documents import links_document
    from meshwright.report.doctor_tables import links_report

    needs_runtime("doctor links")
    document = Plan.read(plan)
    samples = _measured_links(document, pairs)
    if samples is None:  # another rank prints
        return 0
    shape = shape_of(samples, _cluster(cluster, document) or _laptop(document), cores or _cores(samples))
    report = report_links(samples, shape)
    if out is not None:
        name = out.name.removesuffix(".toml")
        write_cluster(measured_cluster(report, shape, name), f"Measured by meshwright doctor links {plan}", out)
    output.show_json(links_document(report)) if as_json else output.show(links_report(report))
    return 1 if report.slow else 0


def _measured_links(plan: Plan, pairs: bool) -> LinkSamples | None:
    """The samples on the rank that prints, None on others."""
    from meshwright.runtime.launch import host_name, joined_world, launched_by_torchrun
    from meshwright.runtime.link_probe import measure_links, measure_links_forked
    from meshwright.runtime.process_groups import ProcessGroupManager

    if not launched_by_torchrun():
        return measure_links_forked(plan.parallel, pairs)
    with joined_world() as device:
        samples = measure_links(ProcessGroupManager(plan.parallel, device), pairs=pairs, host=host_name())
    return samples if int(os.environ["RANK"]) == 0 else None


def _cores(samples: LinkSamples) -> float | None:
    """Cores of a host, where its ranks are CPU processes."""
    from meshwright.runtime.launch import gpus_here

    return None if gpus_here() else float(os.cpu_count() or 1)


def _laptop(plan: Plan) -> Cluster:
    from meshwright import hardware

    return hardware.load("cpu", nodes=1, gpus_per_node=plan.parallel.world_size)


def _given(path: Path | None) -> Plan | None:
    from meshwright.plan import Plan

    return None if path is None else Plan.read(path)


def _cluster(name: str | None, plan: Plan | None) -> Cluster | None:
    """--cluster in the plan's size, None where it was not given."""
    from meshwright import hardware

    if name is None:
        return None
    if plan is None:
        raise InputError("--cluster needs to know the number of ranks: give the plan that was run with --plan")
    world = plan.parallel.world_size
    machine: Any = hardware.load(name)
    return machine if machine.gpus == world else hardware.load(name, gpus=world)
