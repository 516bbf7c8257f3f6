"""The null model: every job on one accelerator in one format reaches the same MFU, the median of the rows it may see.

In: rows with their measured MFU. Out: predicted tokens/s per GPU from the folds that do not hold the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tools.calibrate.rows import Rows

from meshwright.cost.device import peak_flops
from meshwright.models.flops import model_flops_per_token

FloatArray = NDArray[np.float64]
FEWEST = 3
"""Rows without which a median is taken over more: of the format, then of everything."""


@dataclass(frozen=True)
class Utilised:
    """Rows as the null model sees them: tokens/s per GPU at peak, measured MFU, accelerator and format."""

    ids: list[str]
    at_peak: FloatArray
    mfu: FloatArray
    device: list[str]
    precision: list[str]

    @classmethod
    def of(cls, rows: Rows) -> Utilised:
        at_peak = [
            peak_flops(cluster.accelerator, config.precision)
            / float(model_flops_per_token(model, workload.seq, "model_full"))
            for model, cluster, workload, config, _ in rows.cases
        ]
        tokens = [c.global_batch * w.seq / c.world_size for _, _, w, c, _ in rows.cases]
        return cls(
            ids=rows.ids,
            at_peak=np.array(at_peak),
            mfu=np.array(tokens) / rows.measured_s / np.array(at_peak),
            device=[cluster.accelerator.name for _, cluster, _, _, _ in rows.cases],
            precision=[str(config.precision) for _, _, _, config, _ in rows.cases],
        )


def efficiencies(rows: Utilised, fold: NDArray[np.int64]) -> FloatArray:
    """The MFU that the null model takes for every row: the median over rows of other folds."""
    own = np.array([f"{d} {p}" for d, p in zip(rows.device, rows.precision, strict=True)])
    wider = np.array(rows.precision)
    found = np.full(len(rows.ids), np.nan)
    for name in np.unique(fold):
        seen, out = fold != name, fold == name
        for kind in np.unique(own[out]):
            asking = out & (own == kind)
            same_format = wider == wider[asking][0]
            found[asking] = _median(rows.mfu, (seen & (own == kind), seen & same_format, seen))
    return found


def _median(mfu: FloatArray, choices: Sequence[NDArray[np.bool_]]) -> float:
    """Of the first choice that has enough rows, the last where none has."""
    enough = next((rows for rows in choices if rows.sum() >= FEWEST), choices[-1])
    return float(np.median(mfu[enough]))
