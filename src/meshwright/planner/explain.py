"""The reasons behind a ranking, in words and numbers: why a runner-up loses and what bounds the winner.

In: estimates. Out: dataclasses with a sentence each. Nothing is computed anew: all figures are parts of the estimates.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.cost.estimate import Estimate
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import HybridParallelConfig, Recompute, Schedule
from meshwright.ledger import MemoryKind
from meshwright.models.spec import ModelSpec
from meshwright.planner.objectives import Objective

GIB = 2**30
USEFUL = ("forward", "backward")
SAME_SHARE = 0.001
"""Steps within this share are called equally fast."""
SECOND_SHARE = 0.25
"""A second part is named where it makes at least this share of what is lost."""

PART_WORDS = {
    "forward": "forward compute",
    "backward": "backward compute",
    "recompute": "recomputation",
    "tp": "exposed tensor-parallel communication",
    "cp": "exposed context-parallel communication",
    "ep": "exposed expert-parallel communication",
    "pp": "exposed pipeline transfers",
    "dp": "exposed data-parallel communication",
    "bubble": "pipeline bubble",
    "optimizer": "optimizer step",
    "host": "launch-bound and fixed time",
}
MEMORY_WORDS = {
    MemoryKind.PARAMETERS: "parameters",
    MemoryKind.GRADIENTS: "gradients",
    MemoryKind.OPTIMIZER: "optimizer state",
    MemoryKind.ACTIVATIONS: "activations",
    MemoryKind.LOGITS: "logits",
    MemoryKind.BUFFERS: "communication buffers",
    MemoryKind.TEMPORARIES: "temporaries",
    MemoryKind.KV_CACHE: "KV cache",
    MemoryKind.RESERVED: "reserved memory",
}


@dataclass(frozen=True)
class Reason:
    """Why a plan ranks below the winner: `part` (of time or memory) grows most, by `difference` s or bytes. The
    sentence names the part that grows next too where it weighs: tensor parallelism over the network both waits for the
    network and launches more kernels."""

    slower: float  # share of the winner's step: 0.12 is 12 % slower
    more_memory_bytes: int
    part: str
    difference: float
    sentence: str


@dataclass(frozen=True)
class Bound:
    """What limits a plan: the share of the step that does useful work, and the largest loss beside it."""

    useful: float
    part: str
    share: float
    sentence: str


def why_not(
    winner: Estimate, other: Estimate, model: ModelSpec, cluster: Cluster, objective: Objective = Objective.THROUGHPUT
) -> Reason:
    """Why `other` ranks below `winner`."""
    best_s, step_s = winner.time.step_s, other.time.step_s
    slower = step_s / best_s - 1
    more = other.memory.peak.total_bytes - winner.memory.peak.total_bytes
    if objective is Objective.MEMORY:
        kinds = {k: _kind(other, k) - _kind(winner, k) for k in MEMORY_WORDS}
        kind = max(kinds, key=lambda k: kinds[k])
        sentence = f"needs {more / GIB:.1f} GiB more: {MEMORY_WORDS[kind]} {kinds[kind] / GIB:+.1f} GiB"
        return Reason(slower, more, kind.value, float(kinds[kind]), sentence)
    parts = {p: other.time.parts_s[p] - winner.time.parts_s[p] for p in winner.time.parts_s}
    part, second = sorted(parts, key=lambda p: -parts[p])[:2]
    if slower <= SAME_SHARE:
        sentence = f"as fast, with {abs(more) / GIB:.1f} GiB {'more' if more >= 0 else 'less'} memory"
    else:
        named = [part, second] if parts[second] >= SECOND_SHARE * (step_s - best_s) else [part]
        causes = [(p, cause_of(p, winner.config, other.config, model, cluster)) for p in named]
        losses = [f"{seconds(parts[p])} {PART_WORDS[p]}{cause and ' because ' + cause}" for p, cause in causes]
        sentence = f"{slower:.1%} slower: {'; '.join(losses)}"
    return Reason(slower, more, part, parts[part], sentence)


def _kind(estimate: Estimate, kind: MemoryKind) -> int:
    return estimate.memory.peak.bytes_by_kind.get(kind, 0)


def seconds(value: float) -> str:
    """A signed time for a reader."""
    return f"{value:+.2f} s" if abs(value) >= 0.1 else f"{value * 1e3:+.1f} ms"


def cause_of(
    part: str, winner: HybridParallelConfig, other: HybridParallelConfig, model: ModelSpec, cluster: Cluster
) -> str:
    """What in the configuration makes this part of the step longer than the winner's, or ''."""
    if part == "tp":
        if other.tp > cluster.domain >= winner.tp:
            return f"tp={other.tp} leaves the fast domain of {cluster.domain}"
        return _changed("tp", winner.tp, other.tp) or _parallel_form(winner, other)
    if part == "bubble":
        return (
            f"pp={other.pp} with {other.num_microbatches} microbatches and vpp={other.vpp} ({other.schedule.value}) "
            f"waits longer than pp={winner.pp} with {winner.num_microbatches} and vpp={winner.vpp} "
            f"({winner.schedule.value})"
        )
    if part in ("forward", "backward"):
        return _compute_cause(winner, other, model)
    if part == "recompute":
        return f"it recomputes {_recompute(other)} to fit (the winner {_recompute(winner)})"
    if part == "dp":
        if other.zero != winner.zero:
            return f"ZeRO-{other.zero} moves more than ZeRO-{winner.zero} or hides less"
        return _changed("dp", winner.dp, other.dp)
    if part == "optimizer":
        return "more parameters are updated on each rank"
    if part == "host":
        return f"{other.num_microbatches} microbatches of {other.micro_batch} launch more kernels"
    return _changed(part, getattr(winner, part, 1), getattr(other, part, 1))


def _changed(name: str, winner: int, other: int) -> str:
    return f"{name}={other} instead of {winner}" if winner != other else ""


def _parallel_form(winner: HybridParallelConfig, other: HybridParallelConfig) -> str:
    if winner.micro_batch != other.micro_batch:
        return f"micro batch {other.micro_batch} instead of {winner.micro_batch}"
    return "sequence parallel is off" if winner.sequence_parallel and not other.sequence_parallel else ""


def _compute_cause(winner: HybridParallelConfig, other: HybridParallelConfig, model: ModelSpec) -> str:
    chunks = other.pp * other.vpp
    if model.num_layers % chunks and not model.num_layers % (winner.pp * winner.vpp):
        return f"{model.num_layers} layers do not divide over {chunks} pipeline chunks: the fullest stage sets the pace"
    if other.micro_batch < winner.micro_batch:
        return f"micro batch {other.micro_batch} makes smaller products than {winner.micro_batch}"
    if other.tp > winner.tp:
        return f"tp={other.tp} cuts the products finer than tp={winner.tp}"
    if other.expert_tp > winner.expert_tp:
        return f"expert_tp={other.expert_tp} cuts the experts finer"
    if other.pp > winner.pp:
        return f"the head weighs more on one of {other.pp} stages than of {winner.pp}"
    return _changed("pp", winner.pp, other.pp)


def _recompute(config: HybridParallelConfig) -> str:
    if config.recompute is Recompute.NONE:
        return "nothing"
    if config.recompute is Recompute.SELECTIVE:
        return "the core attention"
    return "every layer" if config.recompute_every == 1 else f"one layer of every {config.recompute_every}"


def bound_of(winner: Estimate, model: ModelSpec, cluster: Cluster) -> Bound:
    """What limits a plan."""
    step_s = winner.time.step_s
    useful = sum(winner.time.parts_s.get(p, 0.0) for p in USEFUL) / step_s
    losses = {p: s / step_s for p, s in winner.time.parts_s.items() if p not in USEFUL}
    part = max(losses, key=lambda p: losses[p])
    kernels = winner.efficiency.get("kernels")
    peak = winner.memory.peak
    sentence = f"compute takes {useful:.0%} of the step"
    if kernels is not None:
        sentence += f" (kernels reach {kernels:.0%} of peak)"
    sentence += f"; the largest loss is {PART_WORDS[part]} with {losses[part]:.1%}"
    full = peak.total_bytes / winner.memory.capacity_bytes
    sentence += f"{_detail(part, winner.config, cluster)}; memory is {full:.0%} full on stage {peak.stage}"
    return Bound(useful, part, losses[part], sentence)


def _detail(part: str, config: HybridParallelConfig, cluster: Cluster) -> str:
    if part == "bubble":
        virtual = f", vpp={config.vpp}" if config.schedule is Schedule.INTERLEAVED else ""
        return f" (pp={config.pp}, {config.num_microbatches} microbatches{virtual}, {config.schedule.value})"
    if part == "tp":
        where = "inside the fast domain" if config.tp <= cluster.domain else "across the network"
        return f" (tp={config.tp} {where})"
    if part in ("dp", "cp", "ep", "pp"):
        return f" ({part}={getattr(config, part)})"
    if part == "recompute":
        return f" ({_recompute(config)})"
    return ""


__all__ = ["Bound", "Reason", "bound_of", "cause_of", "why_not"]
