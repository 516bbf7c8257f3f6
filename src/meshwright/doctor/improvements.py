"""Changes of a plan that would make it faster, priced by the cost model: one knob each, same world and global batch.

In: a `Question`. Out: `Improvement`s, the fastest first; each fits in memory and obeys every rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from meshwright.cost.candidates import Candidates
from meshwright.cost.evaluate import evaluate
from meshwright.doctor.cures import Question
from meshwright.errors import InputError
from meshwright.layout.config import V_SHAPED, HybridParallelConfig, Recompute, Schedule
from meshwright.planner.legality import check


@dataclass(frozen=True)
class Improvement:
    """`faster` is the predicted step before over the step after; `knob` is what it is about: 'bubble', 'layout',
    'recompute', 'zero', 'balance'."""

    knob: str
    words: str
    config: HybridParallelConfig
    faster: float


def improvements(question: Question, knobs: Sequence[str] = ()) -> tuple[Improvement, ...]:
    """Those that the cost model says are faster; only of some `knobs` where given."""
    made: list[tuple[str, str, HybridParallelConfig]] = []
    for knob, words, changed in _edits(question.config):
        if knobs and knob not in knobs:
            continue
        config = _legal(question, changed)
        if config is not None:
            made.append((knob, words, config))
    if not made:
        return ()
    candidates = Candidates.from_configs([question.config, *(c for _, _, c in made)])
    priced = evaluate(question.model, question.cluster, question.workload, candidates, question.stack)
    fits = priced.memory_bytes * question.excess <= question.capacity_bytes
    faster = priced.step_s[0] / priced.step_s
    rows = [row for row in range(1, len(made) + 1) if fits[row] and faster[row] > 1.0 and np.isfinite(faster[row])]
    found = [Improvement(*made[row - 1], faster=float(faster[row])) for row in rows]
    return tuple(sorted(found, key=lambda i: -i.faster))


def _legal(question: Question, changed: dict[str, Any]) -> HybridParallelConfig | None:
    try:
        made = replace(question.config, **({"global_batch": int(question.config.global_batch)} | changed))
        check(made, question.model, question.cluster, question.workload.seq)
    except InputError:
        return None
    whole = made.num_microbatches >= 1 and made.global_batch % (made.dp * made.micro_batch) == 0
    return made if whole else None


def _edits(config: HybridParallelConfig) -> Iterator[tuple[str, str, dict[str, Any]]]:
    yield from _bubble(config)
    yield from _layout(config)
    if config.recompute is not Recompute.NONE:
        yield "recompute", "no recompute", {"recompute": Recompute.NONE, "recompute_every": 1}
        if config.recompute is Recompute.FULL:
            yield "recompute", "selective recompute", {"recompute": Recompute.SELECTIVE, "recompute_every": 1}
    for stage in range(4):
        if stage != config.zero and config.dp * config.cp > 1:
            yield "zero", f"ZeRO stage {stage} instead of {config.zero}", {"zero": stage}
    if config.layer_split is not None:
        yield "balance", "layers split evenly over the stages", {"layer_split": None}


def _bubble(config: HybridParallelConfig) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """More microbatches, or a schedule that idles less."""
    for factor in (2, 4, 8):
        if config.micro_batch % factor == 0:
            size = config.micro_batch // factor
            count = config.num_microbatches * factor
            yield (
                "bubble",
                f"micro batch {size}: {count} microbatches instead of {config.num_microbatches}",
                {"micro_batch": size},
            )
    if config.pp == 1:
        return
    plain = {"vpp": 1, "layer_split": None}
    if config.schedule not in (Schedule.ZB_H1, *V_SHAPED):
        yield "bubble", "zero-bubble schedule (zb-h1)", {"schedule": Schedule.ZB_H1, **plain}
        yield "bubble", "zero-bubble schedule in a V (zbv)", {"schedule": Schedule.ZBV, "vpp": 2, "layer_split": None}
    if config.schedule in (Schedule.ONE_F_ONE_B, Schedule.GPIPE):
        for vpp in (2, 4):
            changed = {"schedule": Schedule.INTERLEAVED, "vpp": vpp, "layer_split": None}
            yield "bubble", f"interleaved schedule, {vpp} virtual stages", changed


def _layout(config: HybridParallelConfig) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """One axis halved or doubled against another; larger microbatches."""
    axes = ("dp", "tp", "pp", "cp")
    for less in axes:
        for more in axes:
            size = getattr(config, less)
            if less == more or size % 2:
                continue
            changed: dict[str, Any] = {less: size // 2, more: getattr(config, more) * 2}
            if "pp" in changed:
                changed |= {"layer_split": None}
                if changed["pp"] == 1:
                    changed |= {"schedule": Schedule.ONE_F_ONE_B, "vpp": 1}
            if changed.get("tp") == 1:
                changed["sequence_parallel"] = False
            words = f"{less}={size // 2} and {more}={changed[more]} instead of {size} and {getattr(config, more)}"
            yield "layout", words, changed
    for factor in (2, 4):
        yield "layout", f"micro batch {config.micro_batch * factor}", {"micro_batch": config.micro_batch * factor}
