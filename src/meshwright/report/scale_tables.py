"""Scaling as a person reads it: the best plan at every number of GPUs, the efficiency of each axis, a plot.

In: the planner's `Scaling`. Out: rich renderables and the JSON document.
"""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.cost.workload import Workload
from meshwright.hardware import Cluster
from meshwright.models import ModelSpec
from meshwright.planner.scale import Scaling, ScalingPoint
from meshwright.report.fitted_table import Drawing, table
from meshwright.report.json_documents import estimate_document
from meshwright.report.numbers import gib, percent, whole
from meshwright.report.plan_tables import MOST_PLOT, PLOT_MARGIN, short_config
from meshwright.report.plots import Series, plot

FACTORS = ("tp", "pp", "dp", "cp", "ep")
LOSSLESS = 0.9995
"""A factor above this is shown as 1.000: the axis costs nothing."""


def scaling_report(scaling: Scaling, model: ModelSpec, cluster: Cluster, workload: Workload) -> RenderableType:
    """Table and plot of efficiency against GPUs."""
    kind = "weak scaling (batch per GPU kept)" if scaling.weak else "strong scaling (global batch kept)"
    heading = f"{model.name} on {cluster.name}, {kind}, seq {workload.seq}"
    if scaling.base is None:
        return Group(Text(heading, style="bold"), Text("Nothing fits at any of these sizes.", style="bold red"))
    return Group(
        Text(heading, style="bold"),
        scaling_table(scaling),
        Drawing(lambda width: scaling_plot(scaling, min(MOST_PLOT, width - PLOT_MARGIN))),
    )


def scaling_table(scaling: Scaling) -> Table:
    """One line per count. The last columns: the share of the peak that each axis leaves (their product with kernels and
    recompute is the MFU); `efficiency`: speed per GPU against the first count that fits."""
    factors = [f for f in FACTORS if any(p.factors.get(f, 1.0) < LOSSLESS for p in scaling.points)]
    made = table(
        "", "GPUs", "batch", "best plan", "GiB", "tok/s/GPU", "speed-up", "efficiency", "MFU", *factors, left=0,
        text=("best plan",), expendable=("batch", "speed-up", "cp"),
    )  # fmt: skip
    for point in scaling.points:
        made.add_row(whole(point.gpus), whole(point.global_batch), *_point_cells(point, factors))
    return made


def _point_cells(point: ScalingPoint, factors: list[str]) -> list[str]:
    plan = point.estimate
    if plan is None:
        return ["nothing fits", *("-" for _ in range(5 + len(factors)))]
    return [
        short_config(plan.config),
        gib(plan.memory.peak.total_bytes),
        whole(plan.throughput.tokens_per_s_per_gpu),
        f"{point.speedup:,.1f}x",
        percent(point.efficiency),
        percent(plan.throughput.mfu),
        *(f"{point.factors.get(name, 1.0):.3f}" for name in factors),
    ]


def scaling_plot(scaling: Scaling, width: int = MOST_PLOT) -> str:
    """Efficiency against GPUs, and the factors of tp, pp and dp."""
    points = [p for p in scaling.points if p.estimate is not None]
    gpus = [float(p.gpus) for p in points]
    lines = [Series("efficiency", gpus, [100 * p.efficiency for p in points])]
    lines += [Series(f"{f} factor", gpus, [100 * p.factors.get(f, 1.0) for p in points]) for f in ("tp", "pp", "dp")]
    return plot(lines, x_label="GPUs", y_label="%", log_x=True, y_from=0.0, width=width, ticks=gpus)


def scaling_document(scaling: Scaling, model: ModelSpec, cluster: Cluster, workload: Workload) -> dict[str, Any]:
    """`points[]` with the plan of each."""
    return {
        "model": model.name,
        "cluster": cluster.name,
        "seq": workload.seq,
        "weak": scaling.weak,
        "points": [_point_document(point) for point in scaling.points],
    }


def _point_document(point: ScalingPoint) -> dict[str, Any]:
    return {
        "gpus": point.gpus,
        "global_batch": point.global_batch,
        "tokens_per_s": point.tokens_per_s,
        "speedup": point.speedup,
        "efficiency": point.efficiency,
        "factors": point.factors,
        "plan": None if point.estimate is None else estimate_document(point.estimate),
    }
