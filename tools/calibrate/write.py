"""Writes what a fit found: `fitted.toml` for the cost model, and tables of errors for a person.

In: parameters, solution, rows. Out: text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date

import numpy as np
from tools.calibrate.parameters import Constants, Parameter
from tools.calibrate.problem import FloatArray, Problem
from tools.calibrate.rows import Rows
from tools.calibrate.solve import Solution

SENSITIVE = 0.002
"""A row counts as evidence for a constant where a step of 1 on its free scale moves the row by this much."""


def fitted_toml(parameters: Sequence[Parameter], solution: Solution, rows: int) -> str:
    """The data file: values by kind and owner, and the evidence for each in the same shape."""
    today = date.today().isoformat()
    lines = [
        "# Constants fitted to published measurements by `make calibrate-catalogue`; never edited by hand.",
        f'date = "{today}"',
        f"rows = {rows}",
    ]
    evidence: list[str] = []
    last = ("", "")
    for index, parameter in enumerate(parameters):
        touched = int((np.abs(solution.jacobian[:, index]) > SENSITIVE).sum())
        if not touched:
            continue
        if (parameter.kind, parameter.owner) != last:
            last = (parameter.kind, parameter.owner)
            lines += ["", f'[{parameter.kind}."{parameter.owner}"]']
            evidence += ["", f'[evidence.{parameter.kind}."{parameter.owner}"]']
        free, error = float(solution.free[index]), float(solution.error[index])
        low, high = (parameter.outward(free + side * error) for side in (-1.0, 1.0))
        lines.append(f'"{parameter.field}" = {parameter.outward(free):.5g}')
        evidence.append(f'"{parameter.field}" = "fit {today}, {touched} rows, {low:.3g} to {high:.3g}"')
    return "\n".join([*lines, *evidence]) + "\n"


def error_table(rows: Rows, residuals: FloatArray, key: Callable[[int], str]) -> str:
    """n, median, mean, 90th percentile of absolute errors and median bias of predicted tokens/s, by a key."""
    names = [key(i) for i in range(len(rows))]
    lines = ["| | n | median | mean | p90 | bias |", "|---|---|---|---|---|---|"]
    for name in sorted(set(names)):
        chosen = np.array([n == name for n in names]) & np.isfinite(residuals)
        error = np.exp(-residuals[chosen]) - 1
        if len(error):
            ape = np.abs(error)
            figures = (np.median(ape), ape.mean(), np.quantile(ape, 0.9), np.median(error))
            lines.append(f"| {name} | {len(error)} | " + " | ".join(f"{100 * f:.1f} %" for f in figures) + " |")
    return "\n".join(lines)


def values_of(parameters: Sequence[Parameter], solution: Solution) -> Constants:
    return Constants.of(parameters, solution.free)


__all__ = ["Problem", "error_table", "fitted_toml", "values_of"]
