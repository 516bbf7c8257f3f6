"""`make closing-the-loop`: this machine calibrated once, then 12 layouts predicted and trained.

Layouts of 2 to 8 ranks in one process tree, and of 2 and 4 ranks over two network namespaces (left out where there are
none). Out: a table of predicted and measured steps, the error, the rank correlation, and the regret of the layout that
is predicted best; build/closing-the-loop/result.json. Measured is the quickest tenth of a run's steps: other
programs only add. The layouts share model, batch and data, so their steps can be compared.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tools.namespaces import on_two_machines
from tools.two_machines import reason_to_skip

from meshwright import hardware
from meshwright.doctor.calibration import fit_machine
from meshwright.doctor.cluster_file import write_cluster
from meshwright.doctor.comparison import compare_run
from meshwright.doctor.links import measured_cluster, report_links
from meshwright.doctor.oom import question_of
from meshwright.doctor.run_records import read_run
from meshwright.hardware import Cluster, Link
from meshwright.layout.config import HybridParallelConfig
from meshwright.plan import Plan
from meshwright.runtime.link_probe import measure_links_forked
from meshwright.runtime.machine_probe import measure_machine
from meshwright.runtime.model_config import transformers_config
from meshwright.runtime.tokens import prepare
from meshwright.runtime.trainer import TrainingJob, train_forked

FOLDER = Path("build/closing-the-loop")
DATA = Path("docs")
STEPS = 12
CABLE = "200mbit"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (1, {"tp": 2}),
    "dp2": (1, {"dp": 2}),
    "pp2": (1, {"pp": 2}),
    "dp2 pp2": (1, {"dp": 2, "pp": 2}),
    "dp4": (1, {"dp": 4}),
    "tp4": (1, {"tp": 4}),
    "dp2 tp2 sp zero1": (1, {"dp": 2, "tp": 2, "sequence_parallel": True, "zero": 1}),
    "dp2 pp2 tp2": (1, {"dp": 2, "pp": 2, "tp": 2}),
    "dp8": (1, {"dp": 8}),
    "dp2 over two machines": (2, {"dp": 2}),
    "pp2 over two machines": (2, {"pp": 2}),
    "dp2 tp2 over two machines": (2, {"dp": 2, "tp": 2}),
}


@dataclass(frozen=True)
class Result:
    """One layout: seconds of a step. `cpu_s`: processor seconds of all ranks in a step; `work_s`: those over the cores,
    which is what a step needs where cores limit, whatever else runs on them."""

    name: str
    ranks: int
    machines: int
    predicted_s: float
    measured_s: float
    median_s: float
    cpu_s: float
    work_s: float


def calibrated() -> Cluster:
    """This machine, one cluster file."""
    cores = os.cpu_count() or 1
    fit = fit_machine(measure_machine(cores), "here-core")
    few, many = (measure_links_forked(HybridParallelConfig(dp=n), pairs=False) for n in (2, 4))
    device = fit.accelerator
    start = replace(
        hardware.load("cpu", nodes=1, gpus_per_node=8),
        accelerator=device, reserved_bytes=device.reserved_bytes, shared_cores=float(cores),
    )  # fmt: skip
    report = report_links(many, start, others=(few,))
    rate, link = device.peak_flops["fp32"] / 1e9, report.intra
    print(
        f"calibrated: {rate:.1f} GFLOP/s a core, {link.bandwidth / 1e6:.0f} MB/s and {link.latency_s * 1e6:.0f} us "
        f"a hop; errors on what was measured: steps {fit.step_error:.1%}, collectives {report.error:.1%}",
        flush=True,
    )
    return measured_cluster(report, start, "here")


def between_machines(here: Cluster) -> Link:
    """The cable, measured by `doctor links` on two ranks."""
    plan_of("links", {"dp": 2}, None).write(FOLDER / "links.yaml")
    arguments = ["doctor", "links", str(FOLDER / "links.yaml"), "--cores", "1", "--json"]
    printed = json.loads(on_two_machines(arguments, 1, CABLE, FOLDER / "links-logs", limit_s=600.0))
    link = Link(**printed["inter"])
    print(f"between machines: {link.bandwidth / 1e6:.1f} MB/s, {link.latency_s * 1e6:.0f} us a hop", flush=True)
    return replace(link, name=f"{here.name}-inter")


def plan_of(name: str, parallel: dict[str, Any], cluster: Path | None) -> Plan:
    values = {
        "model": "examples/tiny-llama",
        "workload": {"seq": 64},
        "parallel": {"precision": "fp32", "micro_batch": 1, "global_batch": 8} | parallel,
        "training": {"steps": STEPS},
    }
    return Plan.model_validate(values | ({} if cluster is None else {"cluster": {"name": str(cluster)}}))


def measured(name: str, machines: int, parallel: dict[str, Any], cluster: Cluster) -> Result:
    """Train a layout and compare. On several machines in one, each has its share of the cores."""
    world = HybridParallelConfig(**parallel).world_size
    shared = cluster.shared_cores or 1.0
    sized = replace(
        cluster, nodes=machines, gpus_per_node=world // machines, domain=world // machines,
        shared_cores=shared / machines,
    )  # fmt: skip
    slug = name.replace(" ", "-")
    plan, folder = plan_of(name, parallel, None), FOLDER / slug
    if machines == 1:
        tokens = prepare(DATA, "bytes", FOLDER / "tokens")
        train_forked(TrainingJob(plan, transformers_config(plan), tokens, folder, show_progress=False))
    else:
        plan.write(FOLDER / f"{slug}.yaml")
        arguments = ["train", str(FOLDER / f"{slug}.yaml"), "--data", str(DATA), "--out", str(folder), "--json"]
        on_two_machines(arguments, world // machines, CABLE, FOLDER / f"{slug}-logs", limit_s=600.0)
    run = read_run(folder)
    compared = compare_run(run, question_of(plan, sized, ours=True))
    assert compared is not None
    cpu = sum(statistics.median(s.cpu_s for s in rank.steps[2:]) for rank in run.ranks)
    step = compared.step
    return Result(
        name, world, machines, step.predicted, compared.best_step_s, step.measured, cpu, cpu / (os.cpu_count() or 1)
    )


def spearman(one: list[float], other: list[float]) -> float:
    first, second = (np.argsort(np.argsort(values)).astype(float) for values in (one, other))
    return float(np.corrcoef(first, second)[0, 1])


def summary(results: list[Result], against: str) -> dict[str, float]:
    """Error, rank correlation, and what taking the predicted best costs over the best, against 'measured_s' or
    'work_s'."""
    seen = [float(getattr(r, against)) for r in results]
    predicted = [r.predicted_s for r in results]
    errors = [abs(p / s - 1.0) for p, s in zip(predicted, seen, strict=True)]
    return {
        "median_error": statistics.median(errors),
        "mean_error": statistics.mean(errors),
        "rank_correlation": spearman(predicted, seen),
        "regret": seen[int(np.argmin(predicted))] / min(seen) - 1.0,
    }


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    here, layouts = calibrated(), dict(LAYOUTS)
    reason = reason_to_skip()
    if reason is None:
        here = replace(here, inter=between_machines(here))
    else:
        print(f"layouts over two machines: skipped, {reason}")
        layouts = {name: case for name, case in LAYOUTS.items() if case[0] == 1}
    write_cluster(here, "Measured by make closing-the-loop", FOLDER / "here.toml")
    results: list[Result] = []
    print(f"{'layout':<28}{'ranks':>6}{'predicted':>11}{'measured':>11}{'median':>11}{'CPU':>9}{'error':>8}")
    for name, (machines, parallel) in layouts.items():
        one = measured(name, machines, parallel, here)
        results.append(one)
        times = "".join(f"{1000 * t:>8.0f} ms" for t in (one.predicted_s, one.measured_s, one.median_s))
        error = one.predicted_s / one.measured_s - 1.0
        print(f"{name:<28}{one.ranks:>6}{times}{one.cpu_s:>7.2f} s{error:>8.0%}", flush=True)
    found = {against: summary(results, against) for against in ("measured_s", "work_s")}
    for against, values in found.items():
        print(f"{against}: " + ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in values.items()))
    document = {"layouts": [asdict(r) for r in results], "against": found}
    (FOLDER / "result.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
