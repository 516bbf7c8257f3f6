"""`doctor efficiency`: where a run's time went, which of it is a fault, and the three changes that pay most.

In: a `Run` and its plan in the cost model's terms. Out: `EfficiencyReport`: the mean rank's step in parts, faults
ranked by the seconds of a step that they cost, each with its cure, and the cures as plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from meshwright.cost.collectives import call_seconds
from meshwright.cost.device import network, peak_flops
from meshwright.cost.estimate import Estimate
from meshwright.cost.evaluate import estimate
from meshwright.doctor.cures import Question
from meshwright.doctor.experts import UNEVEN, ExpertLoad, dropped_at, evened, expert_load, explained, load_words
from meshwright.doctor.improvements import Improvement, improvements
from meshwright.doctor.oom import question_of_run
from meshwright.doctor.run_records import Run
from meshwright.doctor.step_times import Breakdown, StepTimes, breakdown, crossing, groups_of, peers, step_times
from meshwright.doctor.stragglers import Straggler, stragglers
from meshwright.hardware import Cluster
from meshwright.layout.config import HybridParallelConfig
from meshwright.ledger import TrafficEntry
from meshwright.models.flops import model_flops_per_token
from meshwright.plan import Plan

IMBALANCED = 1.1
"""Slowest stage over the mean stage from which the split is a fault."""
SLOW_LINK = 2.0
"""Transfer time over what the cluster's links should take, from which a link is a fault."""
LEAST_SHARE = 0.02
"""Of a step: losses below it are not worth a line."""
MOST_CHANGES = 3


@dataclass(frozen=True)
class AxisUse:
    """One axis: seconds of a step that its transfers take (waits for slower ranks apart), that they should take on the
    plan's links, and the bytes that one rank moves."""

    axis: str
    transfer_s: float
    expected_s: float
    step_bytes: int
    hosts: Mapping[str, int]

    @property
    def bytes_per_s(self) -> float:
        return self.step_bytes / self.transfer_s if self.transfer_s > 0 else float("inf")

    @property
    def expected_bytes_per_s(self) -> float:
        return self.step_bytes / self.expected_s if self.expected_s > 0 else float("inf")


@dataclass(frozen=True)
class Fault:
    """Something that costs time: `kind` is 'straggler', 'imbalance', 'experts', 'bubble', 'slow link' or
    'communication'."""

    kind: str
    loss_s: float
    words: str


@dataclass(frozen=True)
class Change:
    """What to do about a fault: the seconds of a step it saves, and the plan's config after it (None: not a matter of
    the plan)."""

    fault: str
    words: str
    saved_s: float
    config: HybridParallelConfig | None


@dataclass(frozen=True)
class EfficiencyReport:
    """`waterfall`: (part, seconds) from the step at peak to the step as it was; their sum is the step. `mfu` counts the
    part of the peak that the ranks of a node can have where they share cores. `experts`: of a model that has them."""

    plan: Plan
    question: Question
    predicted: Estimate
    steps: int
    parts: Breakdown
    axes: tuple[AxisUse, ...]
    stragglers: tuple[Straggler, ...]
    waterfall: tuple[tuple[str, float], ...]
    mfu: float
    faults: tuple[Fault, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()
    experts: ExpertLoad | None = None

    def plan_of(self, config: HybridParallelConfig) -> Plan:
        """The run's plan with a change, ready to be written."""
        return self.plan.model_copy(update={"parallel": config, "provenance": None})


def diagnose_efficiency(run: Run, cluster: Cluster | None = None, plan: Plan | None = None) -> EfficiencyReport:
    """The whole diagnosis of a run. Plan and cluster are the run's own unless given."""
    own, question = question_of_run(run, cluster, plan)
    config = question.config
    times = step_times(run, config)
    parts = breakdown(times)
    predicted = estimate(question.model, question.cluster, question.workload, config, question.stack)
    traffic = run.traffic or predicted.traffic
    axes = tuple(axis_use(times, parts, question.cluster, traffic, axis) for axis in sorted(parts.transfer_s))
    experts = expert_load(run.router, times)
    slow = stragglers(times.compute_s, peers(times), times.hosts, list(range(config.world_size)))
    slow = tuple(s for s in slow if not explained(experts, s))
    waterfall, mfu = _waterfall(question, predicted, parts)
    faults = tuple(sorted(_faults(question, parts, axes, slow, experts), key=lambda f: -f.loss_s))
    changes = _changes(question, parts, axes, faults, experts)
    return EfficiencyReport(
        *(own, question, predicted, len(times.step_s), parts, axes, slow, waterfall, mfu, faults, changes, run.notes),
        experts=experts,
    )


def axis_use(
    times: StepTimes, parts: Breakdown, cluster: Cluster, traffic: Mapping[int, tuple[TrafficEntry, ...]], axis: str
) -> AxisUse:
    """An axis against the links of the plan's cluster; bytes and calls of the busiest stage's ledger."""
    of_axis = [[e for e in entries if e.axis == axis] for entries in traffic.values()] or [list[TrafficEntry]()]
    busiest = max(of_axis, key=lambda entries: sum(e.total_bytes for e in entries))
    return AxisUse(
        axis=axis,
        transfer_s=parts.transfer_s[axis],
        expected_s=sum(_expected(times, cluster, e) for e in busiest),
        step_bytes=sum(e.total_bytes for e in busiest),
        hosts=crossing(times, axis),
    )


def _expected(times: StepTimes, cluster: Cluster, entry: TrafficEntry) -> float:
    """Seconds of a ledger line on the cluster's links, with cores shared where they are."""
    if not entry.calls or entry.group_size < 2:
        return 0.0
    group = groups_of(times, entry.axis)[0]
    stride = np.array([max(1, min((b - a for a, b in pairwise(sorted(group))), default=1))])
    one = call_seconds(
        entry.collective,
        cluster,
        network(),
        np.array([entry.group_size]),
        stride,
        np.array([entry.total_bytes / entry.calls]),
    )
    return float(one[0]) * entry.calls * turns(cluster, times.config)


def turns(cluster: Cluster, config: HybridParallelConfig) -> float:
    """How many ranks take turns on a core."""
    if cluster.shared_cores is None:
        return 1.0
    return max(1.0, min(config.world_size, cluster.gpus_per_node) / cluster.shared_cores)


def _waterfall(
    question: Question, predicted: Estimate, parts: Breakdown
) -> tuple[tuple[tuple[str, float], ...], float]:
    config, seq = question.config, question.workload.seq
    flops = float(model_flops_per_token(question.model, seq, "model_full")) * config.global_batch * seq
    peak = peak_flops(question.cluster.accelerator, config.precision) / turns(question.cluster, config)
    ideal = min(flops / (config.world_size * peak), parts.compute_s)
    computing = sum(predicted.time.parts_s[name] for name in ("forward", "backward", "recompute"))
    again = parts.compute_s * predicted.time.parts_s["recompute"] / computing if computing else 0.0
    again = min(again, parts.compute_s - ideal)
    rows = [("at peak", ideal), ("kernels and host below peak", parts.compute_s - ideal - again), ("recompute", again)]
    rows += [(f"{axis} transfers", seconds) for axis, seconds in sorted(parts.transfer_s.items())]
    rows += [
        ("pipeline bubble", parts.bubble_s),
        ("slowest stage", parts.imbalance_s),
        ("slower ranks of a group", parts.skew_s),
    ]
    return tuple((name, value) for name, value in rows if value > 0), ideal / parts.step_s


def _faults(
    question: Question,
    parts: Breakdown,
    axes: tuple[AxisUse, ...],
    slow: tuple[Straggler, ...],
    experts: ExpertLoad | None,
) -> list[Fault]:
    found = [Fault("straggler", s.excess_s, straggler_words(s)) for s in slow]
    if experts is not None and experts.imbalance > UNEVEN:
        found.append(Fault("experts", experts.loss_s, load_words(experts)))
    stages = parts.stage_compute_s
    mean = float(np.mean(stages))
    if len(stages) > 1 and max(stages) > IMBALANCED * mean:
        worst = int(np.argmax(stages))
        words = f"stage {worst} computes {max(stages) / mean:.2f} times as long as the mean stage"
        found.append(Fault("imbalance", max(stages) - mean, words))
    config = question.config
    if parts.bubble_s > 0:
        words = (
            f"{config.num_microbatches} microbatches over {config.pp} stages ({config.schedule.value}): idle "
            f"{parts.bubble_s / parts.step_s:.0%} of the step, by the schedule itself {parts.schedule_bubble_s:.3g} s"
        )
        found.append(Fault("bubble", parts.bubble_s, words))
    for use in axes:
        slow_link = use.expected_s > 0 and use.transfer_s > SLOW_LINK * use.expected_s
        if use.axis == "pp":  # what is left of a pipeline's waits holds its jitter too: it must be the most of them
            slow_link = slow_link and use.transfer_s > parts.bubble_s + parts.imbalance_s
        where = "; ".join(use.hosts)
        if slow_link:
            rates = f"{use.bytes_per_s / 1e6:,.1f} MB/s where its links should {use.expected_bytes_per_s / 1e6:,.1f}"
            words = f"{use.axis} moves {rates} (groups on {where})"
            found.append(Fault("slow link", use.transfer_s - use.expected_s, words))
        else:
            words = f"{use.axis} transfers are waited for ({use.bytes_per_s / 1e6:,.1f} MB/s; groups on {where})"
            found.append(Fault("communication", use.transfer_s, words))
    return [fault for fault in found if fault.loss_s >= LEAST_SHARE * parts.step_s]


def straggler_words(s: Straggler) -> str:
    """'rank 3 (host a) computes 1.62 times as long as its 3 peers; slowest in 38 of 40 steps (p = 1e-20)'."""
    several = f"host {s.host} (ranks {', '.join(map(str, s.ranks))})"
    who = several if s.kind == "host" else f"rank {s.ranks[0]} ({s.host})"
    return (
        f"{who} computes {s.ratio:.2f} times as long as its peers, slowest of {s.peers} in {s.slowest_in} of {s.steps} "
        f"steps (p = {s.p_value:.0e})"
    )


def _changes(
    question: Question,
    parts: Breakdown,
    axes: tuple[AxisUse, ...],
    faults: tuple[Fault, ...],
    experts: ExpertLoad | None,
) -> tuple[Change, ...]:
    """The cures that pay most, one per fault, then what else the cost model finds faster."""
    found: list[Change] = []
    for fault in faults:
        change = _change(question, parts, axes, fault, experts)
        if change is not None and not any(change.config is not None and change.config == c.config for c in found):
            found.append(change)
    known = {c.config for c in found}
    for better in improvements(question):
        if better.config not in known:
            found.append(_priced(parts, "plan", better))
    return tuple(sorted(found, key=lambda c: -c.saved_s)[:MOST_CHANGES])


def _priced(parts: Breakdown, fault: str, better: Improvement) -> Change:
    """An improvement in seconds of the step as it was measured."""
    return Change(fault, better.words, parts.step_s * (1.0 - 1.0 / better.faster), better.config)


def _change(
    question: Question, parts: Breakdown, axes: tuple[AxisUse, ...], fault: Fault, experts: ExpertLoad | None
) -> Change | None:
    if fault.kind == "straggler":
        return Change("straggler", f"take it out of service or mend it: {fault.words}", fault.loss_s, None)
    if fault.kind == "imbalance":
        return _balanced(question, parts)
    if fault.kind == "experts" and experts is not None:
        return _evened(question, parts, fault, experts)
    if fault.kind == "bubble":
        better = improvements(question, ("bubble",))
        return _capped(parts, fault, better)
    if fault.kind == "slow link":
        return _off_the_link(question, parts, axes, fault)
    return _capped(parts, fault, improvements(question, ("layout",)))


def _capped(parts: Breakdown, fault: Fault, better: tuple[Improvement, ...]) -> Change | None:
    """The best of them; it cannot save more than the fault costs."""
    if not better:
        return None
    change = _priced(parts, fault.kind, better[0])
    return replace(change, saved_s=min(change.saved_s, fault.loss_s))


def _balanced(question: Question, parts: Breakdown) -> Change | None:
    """Layers dealt anew by what each stage was measured to take: a layer's time is that of the stage where it is
    least, what a stage takes beyond its layers (embedding, head) stays where it is."""
    config = question.config
    if config.vpp > 1:
        return None
    layers = config.layer_split or _even(question.model.num_layers, config.pp)
    measured = parts.stage_compute_s
    per_layer = min((t / n for t, n in zip(measured, layers, strict=True) if n), default=0.0)
    rest = [max(0.0, t - n * per_layer) for t, n in zip(measured, layers, strict=True)]
    dealt = [0] * config.pp
    for _ in range(sum(layers)):
        least = min(range(config.pp), key=lambda s: rest[s] + dealt[s] * per_layer)
        dealt[least] += 1
    after = max(rest[s] + dealt[s] * per_layer for s in range(config.pp))
    saved = max(measured) - after
    if saved <= 0 or 0 in dealt:
        return None
    made = replace(config, layer_split=tuple(dealt), global_batch=int(config.global_batch))
    return Change("imbalance", f"layers per stage {', '.join(map(str, dealt))}", saved, made)


def _evened(question: Question, parts: Breakdown, fault: Fault, load: ExpertLoad) -> Change:
    """The layout that loses least to the router as it deals now; else (or beside it) what makes it deal evenly."""
    balance = (
        f"balance the router (a larger router_aux_loss_coef), or bound it: capacity_factor 1.25 would drop "
        f"{dropped_at(load, 1.25):.0%} of the tokens' copies"
    )
    best = Change("experts", balance, fault.loss_s, None)
    for other in evened(question, load):
        left = fault.loss_s * (other.imbalance - 1.0) / (load.imbalance - 1.0)
        saved = fault.loss_s - left - parts.step_s * (other.slower - 1.0)
        if best.config is None or saved > best.saved_s:
            words = f"{other.words}: the fullest rank gets {other.imbalance:.2f} times the mean; or {balance}"
            best = Change("experts", words, saved, other.config) if saved > 0 else best
    return best


def _even(layers: int, stages: int) -> tuple[int, ...]:
    small, more = divmod(layers, stages)
    return tuple(small + (s < more) for s in range(stages))


def _off_the_link(question: Question, parts: Breakdown, axes: tuple[AxisUse, ...], fault: Fault) -> Change:
    """A layout that sends less over the slow link, priced with the link as slow as it was; else mending it."""
    use = next(u for u in axes if fault.words.startswith(f"{u.axis} "))
    slower = use.expected_s / use.transfer_s
    between = any("," in hosts for hosts in use.hosts)
    link = question.cluster.inter if between else question.cluster.intra
    bad = replace(link, bandwidth=link.bandwidth * slower)
    cluster = replace(question.cluster, inter=bad) if between else replace(question.cluster, intra=bad)
    better = improvements(replace(question, cluster=cluster), ("layout",))
    mended = Change("slow link", f"mend the link: {fault.words}", fault.loss_s, None)
    if not better:
        return mended
    change = _priced(parts, "slow link", better[0])
    return replace(mended, config=change.config, words=f"{mended.words}; or {better[0].words}")
