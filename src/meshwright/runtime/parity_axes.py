"""Parity of a plan axis by axis: which combination of axes is right, and which one is to blame where it is not.

In: a `ParityJob`. Out: a report per combination - every axis alone, every pair, the whole plan - and, if the whole
fails, the smallest combination that fails too: the likely cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from math import gcd, prod
from typing import Any

from meshwright.layout.config import ContextVariant, HybridParallelConfig, Recompute, Schedule
from meshwright.runtime.parity import Difference, ParityJob, ParityReport, compare

AXES = ("dp", "pp", "cp", "tp", "ep")
"""Axes that are taken apart. `ep` stands for ep x expert_tp, which overlay dp x cp x tp: not without one of them."""


@dataclass(frozen=True)
class CombinationReport:
    """One combination of the plan's axes, the others at 1."""

    axes: tuple[str, ...]
    config: HybridParallelConfig
    report: ParityReport

    @property
    def label(self) -> str:
        return describe(self.config)


@dataclass(frozen=True)
class PlanParity:
    """`whole` is the verdict; `combinations` are in the order of their size."""

    whole: ParityReport
    combinations: tuple[CombinationReport, ...]
    likely_cause: str | None

    @property
    def first_divergent(self) -> Difference | None:
        return self.whole.first_divergent


def describe(config: HybridParallelConfig) -> str:
    """'dp2 zero3 x pp2 1f1b x tp2 sp' - what makes this layout."""
    parts: list[str] = []
    if config.dp > 1:
        parts.append(f"dp{config.dp}" + (f" zero{config.zero}" if config.zero else ""))
    if config.pp > 1:
        parts.append(f"pp{config.pp} {config.schedule}" + (f" vpp{config.vpp}" if config.vpp > 1 else ""))
    if config.cp > 1:
        parts.append(f"cp{config.cp}" + (" all-to-all" if config.cp_variant is ContextVariant.ALL_TO_ALL else ""))
    if config.tp > 1:
        parts.append(f"tp{config.tp}" + (" sp" if config.sequence_parallel else ""))
    if config.ep > 1:
        parts.append(f"ep{config.ep}")
    if config.expert_tp > 1:
        parts.append(f"expert-tp{config.expert_tp}")
    recompute = "" if config.recompute is Recompute.NONE else f", recompute {config.recompute}"
    return (" x ".join(parts) or "one rank") + recompute


def only(config: HybridParallelConfig, axes: tuple[str, ...]) -> HybridParallelConfig:
    """The plan with the other axes at 1 and what belongs to them at its default."""
    changes: dict[str, Any] = {axis: 1 for axis in AXES if axis not in axes}
    if "dp" not in axes:
        changes |= {"zero": 0, "zero_shards": None}
    if "pp" not in axes:
        changes |= {"schedule": Schedule.ONE_F_ONE_B, "vpp": 1, "layer_split": None}
    if "tp" not in axes:
        changes |= {"sequence_parallel": False}
    if "cp" not in axes:
        changes |= {"cp_variant": ContextVariant.RING}
    ranks = prod(getattr(config, axis) for axis in ("dp", "cp", "tp") if axis in axes)
    expert_tp = gcd(config.expert_tp, ranks) if "ep" in axes else 1
    changes |= {"expert_tp": expert_tp, "ep": gcd(config.ep, ranks // expert_tp) if "ep" in axes else 1}
    return replace(config, **changes)


def smaller_combinations(config: HybridParallelConfig) -> Iterator[tuple[str, ...]]:
    """Proper subsets of the axes in use, smallest first."""
    used = used_axes(config)
    for size in range(1, len(used)):
        for axes in combinations(used, size):
            if "ep" not in axes or "ep" in used_axes(only(config, axes)):
                yield axes


def used_axes(config: HybridParallelConfig) -> tuple[str, ...]:
    sizes = {axis: int(getattr(config, axis)) for axis in AXES}
    sizes["ep"] *= config.expert_tp
    return tuple(axis for axis in AXES if sizes[axis] > 1)


def compare_by_axis(
    job: ParityJob, each_axis: bool = True, progress: Callable[[str], None] = lambda text: None
) -> PlanParity:
    """The whole plan, and its smaller combinations (only if the whole fails, unless `each_axis`)."""
    progress(describe(job.config))
    whole = compare(job)
    reports: list[CombinationReport] = []
    if each_axis or not whole.passed:
        for axes in smaller_combinations(job.config):
            config = only(job.config, axes)
            progress(describe(config))
            reports.append(CombinationReport(axes, config, compare(replace(job, config=config))))
    reports.append(CombinationReport(used_axes(job.config), job.config, whole))
    failing = next((r for r in reports if not r.report.passed), None)
    return PlanParity(whole, tuple(reports), None if failing is None else " x ".join(failing.axes) or "model")
