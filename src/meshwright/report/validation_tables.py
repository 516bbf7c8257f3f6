"""A validation as a person reads it: errors by group of rows, fit decisions, what was skipped and why.

In: a `ValidationReport`. Out: rich renderables.
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.report.fitted_table import table
from meshwright.report.numbers import percent, whole
from meshwright.validation import ValidationReport
from meshwright.validation.metrics import ErrorMetrics, FitMetrics


def validation_report(report: ValidationReport) -> RenderableType:
    """The summary of a file."""
    heading = (
        f"{report.file}: {whole(report.rows)} rows, {whole(len(report.scored))} scored, "
        f"{whole(len(report.skipped))} skipped"
    )
    return Group(Text(heading, style="bold"), Text(), metrics_table(report), Text(), skipped_table(report))


def metrics_table(report: ValidationReport) -> Table:
    """Absolute percentage errors of speed and memory, and fit decisions, one line per group of rows."""
    errors = ("median", "mean", "p90", "bias")
    made = table(
        "Error of tokens/s per GPU, of peak memory (bias: above zero is too high), and fit decisions",
        "rows of", "speed n", *errors, "memory n", *errors, "fit n", "right", "false fits",
    )  # fmt: skip
    for line in report.table():
        made.add_row(line.name, *_errors(line.metrics.rate), *_errors(line.metrics.memory), *_fits(line.metrics.fit))
    return made


def _errors(metrics: ErrorMetrics) -> list[str]:
    if not metrics.n:
        return ["-"] * 5
    return [whole(metrics.n), *(_share(v) for v in (metrics.median_ape, metrics.mape, metrics.p90_ape, metrics.bias))]


def _share(value: float | None) -> str:
    return "-" if value is None else percent(value)


def _fits(fit: FitMetrics) -> list[str]:
    return [whole(fit.n), _share(fit.accuracy), whole(fit.false_fits)] if fit.n else ["-"] * 3


def skipped_table(report: ValidationReport) -> RenderableType:
    """How many rows were skipped for each reason."""
    reasons = report.skip_reasons()
    if not reasons:
        return Text("No row was skipped.")
    made = table("Skipped", "reason", "rows")
    for reason, count in reasons.items():
        made.add_row(reason, whole(count))
    return made
