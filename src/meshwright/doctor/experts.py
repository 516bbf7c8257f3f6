"""Load over experts: how unevenly a router deals tokens, which rank works on most of them, and what that costs a step.

In: the router's counts that a run recorded and every rank's computing time. Out: `ExpertLoad`. Members of an ep group
wait in every exchange for the one with most rows; a rank whose computing exceeds its peers' by no larger a factor than
its rows do is no slow machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.cost.candidates import Candidates
from meshwright.cost.evaluate import evaluate
from meshwright.doctor.cures import Edit, Question, edited
from meshwright.doctor.run_records import RouterStep
from meshwright.doctor.step_times import StepTimes, groups_of
from meshwright.doctor.stragglers import Straggler
from meshwright.layout.config import HybridParallelConfig

UNEVEN = 1.1
"""Rows of the fullest rank of an ep group over the mean from which the router's load is a fault."""


@dataclass(frozen=True)
class ExpertLoad:
    """Means over the steps. `layer_imbalance`: tokens of the fullest expert over the mean, by layer; `rank_load`: rows
    of a rank over the mean of its ep group; `slowest_rank`: the one with most rows for its group; `tokens_per_expert`:
    shares over all layers; `dropped`: share of the copies of tokens beyond the capacity. `loss_s`: by how much the
    fullest rank computes longer than the mean of its group."""

    layer_imbalance: Mapping[int, float]
    rank_load: tuple[float, ...]
    slowest_rank: int
    group: tuple[int, ...]
    tokens_per_expert: tuple[float, ...]
    dropped: float
    loss_s: float

    @property
    def worst_layer(self) -> int:
        return max(self.layer_imbalance, key=lambda layer: self.layer_imbalance[layer])

    @property
    def imbalance(self) -> float:
        """Rows of the fullest rank over the mean of its group."""
        return self.rank_load[self.slowest_rank]


def expert_load(router: Sequence[RouterStep], times: StepTimes) -> ExpertLoad | None:
    """None where the run has no experts, or its counts are not of this plan."""
    world = times.config.world_size
    kept = [step for step in router if len(step.rows_per_rank) == world and sum(step.tokens_per_expert)]
    kept = [step for step in kept if len(step.tokens_per_expert) == len(kept[-1].tokens_per_expert)]
    if not kept:
        return None
    rows = np.mean([step.rows_per_rank for step in kept], axis=0)
    tokens = np.sum([step.tokens_per_expert for step in kept], axis=0)
    groups = groups_of(times, "ep")
    load = np.ones(world)
    for group in groups:
        load[group] = rows[group] / max(float(rows[group].mean()), 1e-9)
    slowest = int(load.argmax())
    group = next(g for g in groups if slowest in g)
    layers = sorted({layer for step in kept for layer in step.imbalance_per_layer})
    computing = np.median(times.compute_s, axis=0)
    return ExpertLoad(
        layer_imbalance={
            layer: float(np.mean([s.imbalance_per_layer[layer] for s in kept if layer in s.imbalance_per_layer]))
            for layer in layers
        },
        rank_load=tuple(load.tolist()),
        slowest_rank=slowest,
        group=tuple(group),
        tokens_per_expert=tuple((tokens / tokens.sum()).tolist()),
        dropped=float(sum(step.dropped for step in kept) / tokens.sum()),
        loss_s=max(0.0, float(computing[slowest] - computing[group].mean())),
    )


def explained(load: ExpertLoad | None, slow: Straggler) -> bool:
    """Whether a rank computes longer by no larger a factor than it has more rows: then nothing is wrong with it."""
    return load is not None and all(load.rank_load[rank] >= max(slow.ratio, UNEVEN) for rank in slow.ranks)


def load_words(load: ExpertLoad) -> str:
    """'rank 2 works on 1.60 times the rows of the mean of its ep group (0, 2); expert 5 gets 40% of the tokens ...'."""
    members = ", ".join(map(str, load.group))
    fullest = int(np.argmax(load.tokens_per_expert))
    worst = load.worst_layer
    return (
        f"rank {load.slowest_rank} works on {load.imbalance:.2f} times the rows of the mean of its ep group "
        f"({members}): expert {fullest} gets {load.tokens_per_expert[fullest]:.0%} of the tokens; "
        f"in layer {worst} the fullest expert gets {load.layer_imbalance[worst]:.2f} times the mean"
    )


def dropped_at(load: ExpertLoad, factor: float) -> float:
    """Share of the tokens' copies that a capacity factor would drop, as experts are filled over all layers."""
    even = 1.0 / len(load.tokens_per_expert)
    return sum(max(0.0, share - factor * even) for share in load.tokens_per_expert)


@dataclass(frozen=True)
class Evened:
    """A layout that spreads the experts otherwise: the rows of its fullest rank over the mean, as the router deals now,
    and the step after over the step before by the cost model, which takes tokens as even."""

    words: str
    config: HybridParallelConfig
    imbalance: float
    slower: float


def evened(question: Question, load: ExpertLoad) -> tuple[Evened, ...]:
    """Layouts whose fullest rank has less to do, that fit."""
    made = [(edit[0], c) for edit in _edits(question.config) if (c := edited(question, (edit,))) is not None]
    if not made:
        return ()
    candidates = Candidates.from_configs([question.config, *(config for _, config in made)])
    priced = evaluate(question.model, question.cluster, question.workload, candidates, question.stack)
    found = [
        Evened(words, config, imbalance_at(load, config.ep), float(priced.step_s[row] / priced.step_s[0]))
        for row, (words, config) in enumerate(made, start=1)
        if priced.memory_bytes[row] * question.excess <= question.capacity_bytes and math.isfinite(priced.step_s[row])
    ]
    return tuple(e for e in found if e.imbalance < load.imbalance)


def imbalance_at(load: ExpertLoad, ep: int) -> float:
    """Rows of the fullest rank over the mean where the experts lie in order on `ep` ranks."""
    shares = np.asarray(load.tokens_per_expert).reshape(ep, -1).sum(axis=1)
    return float(shares.max() * ep)


def _edits(config: HybridParallelConfig) -> Iterator[Edit]:
    """Fewer ranks share the experts out; what is freed holds copies, or slices of every expert."""
    size = config.ep // 2
    while size >= 1:
        yield f"ep={size} instead of {config.ep}", {"ep": size}
        slices = config.expert_tp * config.ep // size
        yield f"ep={size} and expert-tp={slices}: slices of every expert", {"ep": size, "expert_tp": slices}
        size //= 2
