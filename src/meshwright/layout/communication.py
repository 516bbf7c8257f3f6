"""What every axis communicates: groups, collective, how often, bytes per call as a formula, which link, how demanding.

In: a config, the order of ranks and the devices that share a fast domain. Out: one `AxisPattern` per split axis.
The formulas here are words for a reader; the exact bytes are the cost model's ledger, which `with_ledger` fills in.
Symbols: b micro batch, s sequence, h hidden, a bytes per element, L layers of a stage, m microbatches, k experts per
token, P parameters of a rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from meshwright.layout.config import ContextVariant, HybridParallelConfig
from meshwright.layout.grid import RankArray, RankLayout, rank_layout


@dataclass(frozen=True)
class AxisPattern:
    """The communication of one axis. `members_per_domain` of its `group_size` ranks share a fast domain (the fewest in
    any group). `demand` is HIGH where every layer of every microbatch waits for it, MEDIUM where every microbatch
    does, LOW where it happens once a step. `bytes_per_call` is None until a ledger fills it in."""

    axis: str
    groups: int
    group_size: int
    collective: str
    how_often: str
    bytes_formula: str
    members_per_domain: int
    inside_domain: bool
    demand: str
    first_group: tuple[int, ...]
    calls_per_step: int | None = None
    bytes_per_call: int | None = None


@dataclass(frozen=True)
class _Words:
    collective: str
    how_often: str
    bytes_formula: str
    demand: str


def _tensor(config: HybridParallelConfig) -> _Words:
    if config.sequence_parallel:
        return _Words(
            "all-gather + reduce-scatter",
            "2 of each per layer forward and backward, for each microbatch (one more gather backward)",
            "a b (s/cp) h",
            "HIGH",
        )
    return _Words("all-reduce", "2 per layer forward and 2 backward, for each microbatch", "a b (s/cp) h", "HIGH")


def _context(config: HybridParallelConfig) -> _Words:
    if config.cp_variant is ContextVariant.ALL_TO_ALL:
        return _Words(
            "all-to-all of queries, keys and values from tokens to heads, and of the output back",
            "4 per layer forward and 4 backward, for each microbatch",
            "a b (s/cp) (heads / tp) (head size); keys and values of their own heads, cp at least",
            "HIGH",
        )
    return _Words(
        "send and receive around a ring, of keys and values",
        "cp - 1 hops per layer forward, and again backward with gradients, for each microbatch",
        "2 a b (s/cp) (kv heads / tp) (head size)",
        "HIGH",
    )


def _expert(_: HybridParallelConfig) -> _Words:
    return _Words(
        "all-to-all",
        "dispatch and combine per MoE layer forward, and both backward, for each microbatch",
        "a k b (s/cp) h, divided by tp where tokens are split over it",
        "HIGH",
    )


def _expert_tensor(_: HybridParallelConfig) -> _Words:
    return _Words(
        "all-gather + reduce-scatter",
        "one of each per MoE layer forward and backward, for each microbatch",
        "a k b (s/cp) h expert_tp / tp",
        "HIGH",
    )


def _pipeline(config: HybridParallelConfig) -> _Words:
    return _Words(
        "send and receive to the neighbouring stages",
        f"{config.vpp} forward and {config.vpp} backward for each microbatch"
        if config.vpp > 1
        else "once forward and once backward for each microbatch",
        "a b (s/cp) h / tp with sequence parallel, else a b (s/cp) h",
        "MEDIUM",
    )


def _data(config: HybridParallelConfig) -> _Words:
    if config.zero == 3:
        return _Words(
            "all-gather of weights, reduce-scatter of gradients",
            "a gather per layer forward and backward, a scatter per layer backward (for each microbatch)",
            "bytes of one layer's weights (or gradients) of the rank's tp shard",
            "HIGH",
        )
    if config.zero:
        return _Words(
            "reduce-scatter of gradients, all-gather of weights"
            if not _hybrid(config)
            else "reduce-scatter and all-gather within a shard group, all-reduce across",
            "once a step" if config.zero == 1 else "scatter with every microbatch's backward, gather once a step",
            "bytes of the gradients (or weights) of P, in buckets",
            "LOW" if config.zero == 1 else "MEDIUM",
        )
    return _Words(
        "all-reduce of gradients", "once a step, overlapped with the last backward", "gradient bytes of P", "LOW"
    )


def _hybrid(config: HybridParallelConfig) -> bool:
    return config.zero_shards not in (None, config.dp * config.cp)


def _expert_data(config: HybridParallelConfig) -> _Words:
    return replace(_data(config), bytes_formula="as dp, for the expert parameters of the rank")


def _embedding(_: HybridParallelConfig) -> _Words:
    return _Words(
        "all-reduce between first and last stage",
        "once a step, where embedding and head are tied",
        "gradient bytes of vocabulary x h / tp",
        "LOW",
    )


_AXES = (
    ("tp", "tp", _tensor),
    ("cp", "cp", _context),
    ("ep", "ep", _expert),
    ("expert_tp", "expert_tp", _expert_tensor),
    ("pp", "pp", _pipeline),
    ("dp", "dp_cp", _data),
    ("expert_dp", "expert_dp", _expert_data),
    ("embedding", "embedding", _embedding),
)
"""(axis, its groups, its words). Gradients are reduced over dp x cp: ranks of a cp group hold the same weights."""


def communication_patterns(layout: HybridParallelConfig | RankLayout, *, domain: int = 8) -> tuple[AxisPattern, ...]:
    """The pattern of every axis that is split, most demanding first. `domain`: devices that share the fast link."""
    if isinstance(layout, HybridParallelConfig):
        layout = rank_layout(layout)
    config = layout.config
    split_experts = config.ep * config.expert_tp > 1
    patterns: list[AxisPattern] = []
    for axis, group, words in _AXES:
        if axis in ("ep", "expert_tp", "expert_dp") and not split_experts:
            continue
        groups = layout.groups(group)
        if groups.shape[1] > 1:
            patterns.append(_pattern(axis, groups, words(config), domain))
    return tuple(patterns)


def _pattern(axis: str, groups: RankArray, words: _Words, domain: int) -> AxisPattern:
    shared = fewest_sharing(groups, domain)
    return AxisPattern(
        axis=axis,
        groups=len(groups),
        group_size=groups.shape[1],
        collective=words.collective,
        how_often=words.how_often,
        bytes_formula=words.bytes_formula,
        members_per_domain=shared,
        inside_domain=shared == groups.shape[1],
        demand=words.demand,
        first_group=tuple(int(r) for r in groups[0]),
    )


def fewest_sharing(groups: RankArray, domain: int) -> int:
    """The fewest members that any member of any group shares its domain with, itself included."""
    homes = np.sort(groups // domain, axis=1)
    starts = np.ones(homes.shape, dtype=np.bool_)
    starts[:, 1:] = homes[:, 1:] != homes[:, :-1]
    run_ends = np.append(np.flatnonzero(starts.ravel()), homes.size)
    return int(np.diff(run_ends).min())


class LedgerLine(Protocol):
    """The part of `ledger.TrafficEntry` that is read here."""

    @property
    def axis(self) -> str: ...
    @property
    def calls(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...


def with_ledger(patterns: Iterable[AxisPattern], lines: Iterable[LedgerLine]) -> tuple[AxisPattern, ...]:
    """The patterns with calls a step and mean bytes a call, as a traffic ledger of one rank has them."""
    lines = tuple(lines)

    def filled(pattern: AxisPattern) -> AxisPattern:
        own = [line for line in lines if line.axis == pattern.axis and line.calls]
        calls = sum(line.calls for line in own)
        if not calls:
            return pattern
        return replace(
            pattern, calls_per_step=calls, bytes_per_call=round(sum(line.total_bytes for line in own) / calls)
        )

    return tuple(filled(pattern) for pattern in patterns)


def analyze_communication_patterns(config: HybridParallelConfig, *, domain: int = 8) -> tuple[AxisPattern, ...]:
    """Print the communication pattern of every axis, and return it (the guide's name).

    Corrected against the guide: data parallelism has one group for every (pp, tp) place, not one in all; every axis
    counts its real groups; axes of size 1 communicate nothing and are left out.
    """
    patterns = communication_patterns(config, domain=domain)
    print(describe(patterns, domain=domain))
    return patterns


def describe(patterns: Iterable[AxisPattern], *, domain: int = 8) -> str:
    """The patterns as text, one paragraph per axis."""
    paragraphs: list[str] = []
    for p in patterns:
        where = "inside" if p.inside_domain else f"across ({p.members_per_domain} of {p.group_size} ranks share one)"
        groups = f"{p.groups} group{'s' if p.groups > 1 else ''} of {p.group_size}"
        lines = [
            f"{p.axis}: {groups}, e.g. {_some_ranks(p.first_group)}",
            f"  {p.collective}",
            f"  how often  {p.how_often}",
            f"  bytes      {p.bytes_formula}" + (f" = {p.bytes_per_call:,}" if p.bytes_per_call is not None else ""),
            f"  link       {where} fast domains of {domain}",
            f"  demand     {p.demand}",
        ]
        paragraphs.append("\n".join(lines))
    return "\n".join(paragraphs) or "no axis is split: one rank, no communication"


def _some_ranks(ranks: tuple[int, ...], most: int = 8) -> str:
    head = ", ".join(str(r) for r in ranks[:most])
    return f"[{head}]" if len(ranks) <= most else f"[{head}, ... {ranks[-1]}]"
