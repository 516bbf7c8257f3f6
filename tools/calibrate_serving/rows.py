"""Serving measurements as the fit needs them: cases, engines, folds, weights.

In: a file of rows. Out: `Rows`. Tier A counts most, B half; rows of large families count less each, so that no engine
drowns the others.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tools.calibrate.problem import FloatArray
from tools.calibrate.rows import FAMILY_POWER, SPREAD, TIER_WEIGHT, TYPICAL_FAMILY

from meshwright.validation.lines import read_rows
from meshwright.validation.serving_row import Kind, ServingCase, serving_case
from meshwright.validation.shapes import Shapes
from meshwright.validation.skip import SkippedError
from meshwright.validation.validate import group_of


@dataclass(frozen=True)
class Rows:
    """Parallel lists over rows. `config_groups`: the same model on the same devices split in the same way, whatever the
    lengths, the release and the batch."""

    cases: list[ServingCase]
    measured: FloatArray
    config_groups: list[str]
    weight: FloatArray
    scale: FloatArray

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def ids(self) -> list[str]:
        return [case.group.id for case in self.cases]

    @property
    def families(self) -> list[str]:
        return [case.group.family for case in self.cases]


def load_rows(path: Path) -> Rows:
    """Rows with a measured rate."""
    shapes = Shapes()
    found: list[ServingCase] = []
    for row in read_rows(path):
        try:
            case = serving_case(row, group_of(row), shapes)
        except SkippedError:
            continue
        if case.measured_rate is not None and case.kind is not Kind.OOM and case.group.tier in TIER_WEIGHT:
            found.append(case)
    size = Counter(case.group.family for case in found)
    weight = [
        TIER_WEIGHT[case.group.tier] * (size[case.group.family] / TYPICAL_FAMILY) ** FAMILY_POWER for case in found
    ]
    return Rows(
        cases=found,
        measured=np.array([case.measured_rate or np.nan for case in found]),
        config_groups=[_config_group(case) for case in found],
        weight=np.array(weight),
        scale=np.array([SPREAD[case.group.architecture] for case in found]),
    )


def _config_group(case: ServingCase) -> str:
    c = case.config
    split = f"dp{c.dp} tp{c.tp} pp{c.pp} ep{c.ep}"
    return f"{case.model.name} {case.cluster.accelerator.name} {c.precision} {split}"
