"""`meshwright calibrate`: measure this machine - products, memory, layers, links - and write it as a cluster file.

Out: a TOML that every command takes as --cluster; how far its constants are off on what they were fitted to.
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from meshwright.commands import output
from meshwright.commands.options import Json
from meshwright.commands.runtime_room import needs_runtime
from meshwright.errors import InputError
from meshwright.report.doctor_documents import links_document
from meshwright.report.numbers import percent, seconds

if TYPE_CHECKING:
    from meshwright.doctor.calibration import Fit
    from meshwright.doctor.links import LinkReport

Ranks = Annotated[int, typer.Option("--ranks", min=2, max=64, help="Ranks between which links are measured.")]
OutFile = Annotated[Path, typer.Option("--out", "-o", help="The cluster file.", metavar="FILE.toml")]


def calibrate(ranks: Ranks = 4, out: OutFile = Path("cluster.toml"), as_json: Json = False) -> int:
    """Measure what this CPU machine computes and sends, and write a cluster file that predicts it.

    Products by shape and small models run on every core at once, as ranks would; then collectives of --ranks ranks.
    (GPUs: measure links with doctor links under torchrun; the catalogue has their constants.)
    """
    needs_runtime("calibrate")
    from meshwright import hardware
    from meshwright.doctor.calibration import fit_machine
    from meshwright.doctor.cluster_file import write_cluster
    from meshwright.doctor.links import measured_cluster, report_links
    from meshwright.layout.config import HybridParallelConfig
    from meshwright.runtime.launch import gpus_here
    from meshwright.runtime.link_probe import measure_links_forked
    from meshwright.runtime.machine_probe import measure_machine

    if gpus_here():
        raise InputError("calibrate measures CPU machines and this one has GPUs; hide them (CUDA_VISIBLE_DEVICES=)")
    cores = os.cpu_count() or 1
    name = out.name.removesuffix(".toml")
    output.show(f"products, copies and small models on {cores} processes at once ...", stderr=True)
    fit = fit_machine(measure_machine(cores), f"{name}-core")
    output.show(f"collectives between 2 and {ranks} ranks ...", stderr=True)
    few, many = (measure_links_forked(HybridParallelConfig(dp=n), pairs=False) for n in (2, ranks))
    start = replace(hardware.load("cpu", nodes=1, gpus_per_node=ranks), shared_cores=float(cores))
    report = report_links(many, start, others=(few,))
    device = fit.accelerator
    machine = measured_cluster(
        report, replace(start, accelerator=device, reserved_bytes=device.reserved_bytes, domain=ranks), name
    )
    write_cluster(machine, f"Measured by meshwright calibrate on {date.today()}, {cores} cores", out)
    if as_json:
        output.show_json(_document(fit, report, cores, out))
    else:
        output.show(_words(fit, report, cores, out))
    return 0


def _words(fit: Fit, report: LinkReport, cores: int, out: Path) -> Text:
    device = fit.accelerator
    rates = ", ".join(f"{name} {rate / 1e9:,.1f}" for name, rate in device.peak_flops.items())
    errors = [percent(error) for error in (fit.product_error, fit.step_error, report.error)]
    hop = f"{report.intra.bandwidth / 1e6:,.0f} MB/s, {seconds(report.intra.latency_s)} a hop"
    lines = [
        f"{cores} cores; a rank on each: {rates} GFLOP/s, {device.memory_bandwidth / 1e9:.1f} GB/s",
        f"between ranks {hop}",
        f"median error on products {errors[0]}, on steps of small models {errors[1]}, on collectives {errors[2]}",
        f"written to {out}: meshwright plan MODEL --cluster {out} --gpus N",
    ]
    return Text("\n".join(lines))


def _document(fit: Fit, report: LinkReport, cores: int, out: Path) -> dict[str, Any]:
    return {
        "cores": cores,
        "accelerator": asdict(fit.accelerator),
        "product_error": fit.product_error,
        "step_error": fit.step_error,
        "links": links_document(report),
        "out": str(out),
    }
