"""The doctor's names for scripts: `diagnose_oom(folder)`, `diagnose_efficiency(folder)` (docs/from-the-guide.md).

In: the folder of a run (or a plan), and what differs from what stands in it. Out: the reports of the commands.
"""

from __future__ import annotations

from pathlib import Path

from meshwright import hardware
from meshwright.doctor import efficiency, oom
from meshwright.doctor.efficiency import EfficiencyReport
from meshwright.doctor.oom import OomReport
from meshwright.doctor.run_records import read_run
from meshwright.hardware import Cluster
from meshwright.plan import Plan


def diagnose_oom(
    run: str | Path | Plan, *, cluster: str | Cluster | None = None, plan: Plan | None = None
) -> OomReport:
    """Memory of a run's folder, or of a plan that has not run; with cures that fit, priced."""
    if isinstance(run, Plan):
        return oom.diagnose_plan(run, _cluster(cluster, run))
    found = read_run(Path(run))
    return oom.diagnose_oom(found, _cluster(cluster, plan or found.plan), plan)


def diagnose_efficiency(
    run: str | Path, *, cluster: str | Cluster | None = None, plan: Plan | None = None
) -> EfficiencyReport:
    """Where the time of a run's folder went, its faults by cost, and the changes that pay most. `plan` describes the
    groups of a run that left none: any script may write the records of docs/doctor.md."""
    found = read_run(Path(run))
    return efficiency.diagnose_efficiency(found, _cluster(cluster, plan or found.plan), plan)


def _cluster(named: str | Cluster | None, plan: Plan | None) -> Cluster | None:
    """A cluster by name in the plan's size."""
    if named is None or isinstance(named, Cluster):
        return named
    return hardware.load(named) if plan is None else hardware.load(named, gpus=plan.parallel.world_size)
