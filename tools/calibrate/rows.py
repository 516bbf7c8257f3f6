"""Measurement rows as the fit needs them: cases, measured seconds, weights, folds.

In: a file of training rows. Out: `Rows`. Tier A counts most, B half, C nothing; large families count less per row, so
that no sweep of thousands drowns the others.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tools.calibrate.problem import Case, FloatArray

from meshwright.cost.candidates import Candidates, unit_keys
from meshwright.cost.memory import training_memory
from meshwright.cost.stages import stages
from meshwright.models.spec import MoeMlp
from meshwright.validation.lines import read_rows
from meshwright.validation.scored import Group
from meshwright.validation.skip import SkippedError
from meshwright.validation.training_row import Shapes, TrainingCase, training_case

TIER_WEIGHT = {"A": 1.0, "B": 0.5}
FAMILY_POWER = -0.4
TYPICAL_FAMILY = 50
SPREAD = {"dense": 0.05, "moe": 0.10}
"""Residual scale of ordinary rows: the same job in another software release differs by 3.6 % (dense) and 8.5 %
(mixture of experts) in the median (README of the measurements)."""

SWEEP_ROWS = 300
SWEEP_SPREAD = 0.10
"""Families with more rows are sweeps over corners (host-bound, latency-bound) that few constants cannot follow."""


@dataclass(frozen=True)
class Rows:
    """Parallel lists over rows."""

    ids: list[str]
    families: list[str]
    tiers: list[str]
    kinds: list[str]
    config_groups: list[str]
    cases: list[Case]
    measured_s: FloatArray
    weight: FloatArray
    scale: FloatArray

    def __len__(self) -> int:
        return len(self.ids)


def load_rows(path: Path) -> Rows:
    """Rows with a measured rate in tiers A and B."""
    shapes = Shapes()
    named: list[tuple[dict[str, str], TrainingCase]] = []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for line, row in zip(lines, read_rows(path), strict=True):
        if line.get("tier") not in TIER_WEIGHT:
            continue
        group = Group(line["id"], line["family"], line["tier"], line.get("dense_or_moe", ""))
        try:
            case = training_case(row, group, shapes)
        except SkippedError:
            continue
        if case.measured.tokens_per_s_per_gpu is not None:
            named.append((line, case))
    return _rows([line for line, _ in named], [case for _, case in named])


def _rows(lines: list[dict[str, str]], found: list[TrainingCase]) -> Rows:
    cases = [_settled(case) for case in found]
    seconds = [
        config.global_batch * workload.seq / (case.measured.tokens_per_s_per_gpu or np.nan) / config.world_size
        for (_, _, workload, config, _), case in zip(cases, found, strict=True)
    ]
    families = [line["family"] for line in lines]
    size = Counter(families)
    kinds = ["moe" if any(isinstance(k.mlp, MoeMlp) for k in case.model.kinds) else "dense" for case in found]
    weight = [TIER_WEIGHT[line["tier"]] * (size[line["family"]] / TYPICAL_FAMILY) ** FAMILY_POWER for line in lines]
    scale = [
        max(SPREAD[k], SWEEP_SPREAD if size[f] > SWEEP_ROWS else 0.0) for k, f in zip(kinds, families, strict=True)
    ]
    return Rows(
        ids=[line["id"] for line in lines],
        families=families,
        tiers=[line["tier"] for line in lines],
        kinds=kinds,
        config_groups=[line.get("config_group") or line["id"] for line in lines],
        cases=cases,
        measured_s=np.array(seconds),
        weight=np.array(weight),
        scale=np.array(scale),
    )


def _settled(case: TrainingCase) -> Case:
    """The first of the row's possible configurations that fits (several only where recompute is not stated)."""
    chosen = case.configs[-1]
    if len(case.configs) > 1:
        candidates = Candidates.from_configs(list(case.configs))
        held = training_memory(
            case.model,
            case.cluster,
            case.workload,
            candidates,
            stages(case.model, candidates),
            unit_keys(candidates),
            case.stack,
        )
        fits = held.peak_bytes <= case.cluster.accelerator.memory_bytes
        if fits.any():
            chosen = case.configs[int(np.argmax(fits))]
    return case.model, case.cluster, case.workload, chosen, case.stack
