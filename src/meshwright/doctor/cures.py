"""Cures for a plan that needs too much memory: single changes and pairs, triples where none of those fits.

In: model, cluster, workload, the plan's config. Out: `Cure`s, each a legal config of the same world and global batch
with what it saves and costs by the cost model: those that fit first, the fastest of them first, then near misses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from meshwright.cost.candidates import Candidates
from meshwright.cost.evaluate import evaluate
from meshwright.cost.program.memory import written_down
from meshwright.cost.program.own_runtime import OWN_STACK, predicted_peak
from meshwright.cost.stack import Stack
from meshwright.cost.workload import Workload
from meshwright.errors import InputError
from meshwright.hardware import Cluster
from meshwright.layout.config import V_SHAPED, HybridParallelConfig, Recompute, Schedule
from meshwright.models import ModelSpec
from meshwright.planner.explore import HEADROOM
from meshwright.planner.legality import check

MOST_TOGETHER = 3
"""Changes that are tried at once."""
PREFER_FEWER = 1.05
"""A cure of one more change must be this much faster to come first."""


@dataclass(frozen=True)
class Question:
    """A plan in the cost model's terms. `excess` is by how much the memory that was seen exceeded the prediction (1:
    not at all, or nothing was seen): what is predicted for a cure is multiplied by it."""

    model: ModelSpec
    cluster: Cluster
    workload: Workload
    config: HybridParallelConfig
    stack: Stack
    excess: float = 1.0

    @property
    def capacity_bytes(self) -> int:
        return self.cluster.accelerator.memory_bytes


@dataclass(frozen=True)
class Cure:
    """One change, or a few together. `slower` is the step after over the step before; `comfortable`: as much memory
    stays free as the planner leaves free."""

    changes: tuple[str, ...]
    config: HybridParallelConfig
    peak_bytes: int
    saved_bytes: int
    step_s: float
    slower: float
    fits: bool
    comfortable: bool


Edit = tuple[str, dict[str, Any]]

WALKED = 24
"""Of the cures that come first, how many are walked through allocation by allocation where that can be done."""


def cures(question: Question, most: int = 4) -> tuple[Cure, ...]:
    """The best `most` cures, and every single change beside them: what each knob alone saves and costs."""
    found: list[Cure] = []
    singles = [edit for edit in _edits(question.config) if edited(question, (edit,)) is not None]
    for together in range(1, MOST_TOGETHER + 1):
        found = _walked(question, [*found, *_priced(question, list(combinations(singles, together)))])
        if together > 1 and any(cure.comfortable for cure in found):
            break
    ranked = sorted(found, key=_rank)
    return (*ranked[:most], *(cure for cure in ranked[most:] if len(cure.changes) == 1))


def _rank(cure: Cure) -> tuple[bool, bool, float]:
    paced = cure.step_s * PREFER_FEWER ** len(cure.changes)
    return (not cure.comfortable, not cure.fits, paced if cure.fits else float(cure.peak_bytes))


def _distinct(found: Sequence[Cure]) -> Iterator[Cure]:
    """One cure per config: the one of fewest changes."""
    seen: set[HybridParallelConfig] = set()
    for cure in found:
        if cure.config not in seen:
            seen.add(cure.config)
            yield cure


def _walked(question: Question, found: Sequence[Cure]) -> list[Cure]:
    """The distinct cures; memory of the first ones as our own runtime allocates it, where that is known better than by
    the sum of terms that prices thousands. What was seen in a run (`excess`) is known better still."""
    ranked = sorted(_distinct(found), key=_rank)
    known = question.stack.name == OWN_STACK and written_down(question.model)
    if not known or question.excess != 1.0:
        return ranked
    before = _walked_bytes(question, question.config)
    return [*(_with_bytes(question, c, before) for c in ranked[:WALKED]), *ranked[WALKED:]]


def _walked_bytes(question: Question, config: HybridParallelConfig) -> int:
    return predicted_peak(question.model, question.workload, config) + question.cluster.reserved_bytes


def _with_bytes(question: Question, cure: Cure, before: int) -> Cure:
    peak, capacity = _walked_bytes(question, cure.config), question.capacity_bytes
    return replace(
        cure,
        peak_bytes=peak,
        saved_bytes=before - peak,
        fits=peak <= capacity,
        comfortable=peak <= (1.0 - HEADROOM) * capacity,
    )


def _edits(config: HybridParallelConfig) -> Iterator[Edit]:
    """(words, changed fields) of every single change that may help."""
    for factor in (2, 4, 8):
        if config.dp % factor == 0:
            for axis, name in (("tp", "tensor"), ("pp", "pipeline"), ("cp", "context")):
                size = getattr(config, axis) * factor
                changed: dict[str, Any] = {axis: size, "dp": config.dp // factor}
                if axis == "tp":
                    changed["sequence_parallel"] = True
                if axis == "pp":
                    changed["layer_split"] = None
                yield f"more {name} parallel: {axis}={size}, dp={changed['dp']}", changed
        if config.micro_batch % factor == 0:
            yield f"micro batch {config.micro_batch // factor}", {"micro_batch": config.micro_batch // factor}
    if config.recompute is Recompute.NONE:
        yield "selective recompute", {"recompute": Recompute.SELECTIVE}
    if config.recompute is not Recompute.FULL:
        yield "full recompute", {"recompute": Recompute.FULL, "recompute_every": 1}
    elif config.recompute_every > 1:
        yield "full recompute of every layer", {"recompute_every": 1}
    if config.tp > 1 and not config.sequence_parallel:
        yield "sequence parallel", {"sequence_parallel": True}
    for stage in range(config.zero + 1, 4):
        if config.dp * config.cp > 1:
            yield f"ZeRO stage {stage}", {"zero": stage}
    if config.pp > 1 and config.schedule is Schedule.GPIPE:
        yield "1F1B schedule", {"schedule": Schedule.ONE_F_ONE_B}
    if config.schedule is Schedule.INTERLEAVED:
        yield "no virtual stages (vpp=1)", {"schedule": Schedule.ONE_F_ONE_B, "vpp": 1, "layer_split": None}
    if config.pp > 1 and config.vpp == 1 and config.schedule not in V_SHAPED:
        yield "virtual stages in a V (vpp=2, zbv)", {"schedule": Schedule.ZBV, "vpp": 2, "layer_split": None}


def edited(question: Question, edits: Sequence[Edit]) -> HybridParallelConfig | None:
    """The config with the edits, None where they contradict each other or break a rule."""
    changed: dict[str, Any] = {"global_batch": int(question.config.global_batch)}
    for _, fields in edits:
        if any(name in changed and changed[name] != value for name, value in fields.items()):
            return None
        changed |= fields
    try:
        made = replace(question.config, **changed)
        check(made, question.model, question.cluster, question.workload.seq)
    except InputError:
        return None
    if made.num_microbatches < 1 or made.global_batch % (made.dp * made.micro_batch):
        return None
    return made


def _priced(question: Question, groups: Sequence[tuple[Edit, ...]]) -> list[Cure]:
    """The groups of edits that are legal, with what they save and cost."""
    made = [(g, c) for g in groups if (c := edited(question, g)) is not None]
    if not made:
        return []
    candidates = Candidates.from_configs([question.config, *(c for _, c in made)])
    priced = evaluate(question.model, question.cluster, question.workload, candidates, question.stack)
    peaks = priced.memory_bytes * question.excess
    found: list[Cure] = []
    for row, (group, config) in enumerate(made, start=1):
        peak = float(peaks[row])
        if not np.isfinite(priced.step_s[row]) or peak >= peaks[0]:
            continue  # saves nothing
        found.append(
            Cure(
                changes=tuple(words for words, _ in group),
                config=config,
                peak_bytes=round(peak),
                saved_bytes=round(float(peaks[0]) - peak),
                step_s=float(priced.step_s[row]),
                slower=float(priced.step_s[row] / priced.step_s[0]),
                fits=peak <= question.capacity_bytes,
                comfortable=peak <= (1.0 - HEADROOM) * question.capacity_bytes,
            )
        )
    return found
