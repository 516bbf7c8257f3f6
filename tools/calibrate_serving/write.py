"""Writes what a fit found: the text of src/meshwright/cost/data/serving_fitted.toml, and tables of errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import date

import numpy as np
from tools.calibrate.solve import Solution
from tools.calibrate.write import SENSITIVE
from tools.calibrate_serving.rows import Rows
from tools.calibrate_serving.traits import RANGES, Parameter, engines


def fitted_toml(chosen: Sequence[Parameter], solution: Solution, rows: int) -> str:
    """Traits by engine, and the evidence for each in the same shape. A trait that no row tells is left out."""
    today = date.today().isoformat()
    lines = [
        "# Traits of inference engines fitted to published measurements by `make calibrate-catalogue`; never edited by",
        "# hand. A release that is not here, or lacks a trait, has that of the release it is based on.",
        f'date = "{today}"',
        f"rows = {rows}",
    ]
    evidence: list[str] = []
    found, last = engines(chosen, solution.free), ""
    for index, parameter in enumerate(chosen):
        touched = int((np.abs(solution.jacobian[:, index]) > SENSITIVE).sum())
        if not touched:
            continue
        if parameter.owner != last:
            last = parameter.owner
            lines += ["", f'[engine."{last}"]']
            evidence += ["", f'[evidence."{last}"]']
        value = getattr(found[parameter.owner], parameter.field)
        r, error = RANGES[parameter.field], float(solution.error[index])
        low, high = (float(np.clip(value * np.exp(side * error), r.low, r.high)) for side in (-1.0, 1.0))
        lines.append(f"{parameter.field} = {value:.5g}")
        evidence.append(f'{parameter.field} = "fit {today}, {touched} rows, {low:.3g} to {high:.3g}"')
    return "\n".join([*lines, *evidence]) + "\n"


def error_lines(rows: Rows, rates: Mapping[str, float], key: Callable[[int], str]) -> list[str]:
    """n, median, mean and 90th percentile of absolute errors, by a key."""
    names = np.array([key(i) for i in range(len(rows))])
    error = np.abs(np.array([rates[name] for name in rows.ids]) / rows.measured - 1.0)
    lines: list[str] = []
    for name in np.unique(names).tolist():
        some = error[names == name]
        figures = (float(np.median(some)), float(some.mean()), float(np.quantile(some, 0.9)))
        lines.append(f"{name:55s} {len(some):4d}  " + "  ".join(f"{100 * f:5.1f} %" for f in figures))
    return lines
