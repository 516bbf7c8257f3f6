"""The rules that sizes must obey, once for both uses: one config (an error in words) and many (a mask of arrays).

A `Rule` is a test in element-wise arithmetic over `Sizes` (ints, or arrays of one length) and what is known of the
model and the cluster, and a message for the case of one. A rule whose facts are unknown (None) does not apply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ModelFacts:
    """What the rules ask of a model; None where it does not apply or is not known.

    `heads` and `kv_heads`, where layers differ, are the greatest common divisors over the layers. `mlp_width` and
    `expert_width` are columns of one (gate or up) matrix. `seq` is the training sequence in tokens.
    """

    heads: int | None = None
    kv_heads: int | None = None
    layers: int | None = None
    hidden: int | None = None
    mlp_width: int | None = None
    vocab: int | None = None
    experts: int | None = None  # 0: dense
    expert_width: int | None = None
    seq: int | None = None


@dataclass(frozen=True)
class ClusterFacts:
    """What the rules ask of a cluster."""

    gpus: int | None = None
    gpus_per_node: int | None = None


@dataclass(frozen=True)
class Sizes:
    """The sizes of one configuration (ints and bools) or of many (arrays of one length)."""

    dp: Any
    tp: Any
    pp: Any
    cp: Any
    ep: Any
    expert_tp: Any
    vpp: Any
    micro_batch: Any
    global_batch: Any
    sequence_parallel: Any
    interleaved: Any
    v_shaped: Any
    zero_shards: Any
    heads_exchanged: Any = False  # context parallelism by all-to-all
    layer_split: Any = None

    @property
    def world(self) -> Any:
        return self.dp * self.pp * self.cp * self.tp

    @property
    def stage_ranks(self) -> Any:
        return self.dp * self.cp * self.tp


@dataclass(frozen=True)
class Facts:
    """Model and cluster facts together, as rules see them."""

    model: ModelFacts = ModelFacts()
    cluster: ClusterFacts = ClusterFacts()


@dataclass(frozen=True)
class Rule:
    """`holds` is element-wise; `needs` names the facts without which the rule does not apply."""

    name: str
    holds: Callable[[Sizes, Facts], Any]
    message: Callable[[Sizes, Facts], str]
    needs: tuple[str, ...] = ()

    def applies(self, facts: Facts) -> bool:
        known = {**vars(facts.model), **vars(facts.cluster)}
        return all(known[name] is not None for name in self.needs)


def first_violation(rules: Iterable[Rule], sizes: Sizes, facts: Facts | None = None) -> str | None:
    """The message of the first rule that one configuration breaks."""
    facts = facts or Facts()
    for rule in rules:
        if rule.applies(facts) and not rule.holds(sizes, facts):
            return rule.message(sizes, facts)
    return None


def mask(rules: Iterable[Rule], sizes: Sizes, facts: Facts, length: int) -> Any:
    """Which of many configurations obey every rule: [length] of bool."""
    result = np.ones(length, dtype=np.bool_)
    for rule in rules:
        if rule.applies(facts):
            result &= rule.holds(sizes, facts)
    return result


def divisors(number: int) -> list[int]:
    """Every divisor, ascending."""
    low = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]


def nearest(value: int, choices: Iterable[int]) -> str:
    """'try 2 or 4': the valid values next to `value` on either side."""
    choices = sorted(set(choices))
    below = [c for c in choices if c < value][-1:]
    above = [c for c in choices if c > value][:1]
    return " or ".join(str(c) for c in below + above)


def _implies(condition: Any, then: Any) -> Any:
    return np.logical_or(np.logical_not(condition), then)


def _try(value: int, choices: Iterable[int]) -> str:
    near = nearest(value, choices)
    return f"; try {near}" if near else ""


def _batch_message(s: Sizes, _: Facts) -> str:
    unit = s.dp * s.micro_batch
    below = s.global_batch // unit * unit
    tries = " or ".join(str(b) for b in (below, below + unit) if b)
    return (
        f"global batch {s.global_batch} is not a multiple of dp={s.dp} x micro batch {s.micro_batch} = {unit}; "
        f"try {tries}"
    )


def _chunks_fit_schedule(s: Sizes, _: Facts) -> Any:
    v_shape = np.logical_and(s.v_shaped, s.vpp == 2)
    rounds = np.logical_and(s.interleaved, np.logical_and(s.vpp > 1, s.pp > 1))
    plain = np.logical_not(np.logical_or(s.v_shaped, s.interleaved))
    return v_shape | rounds | np.logical_and(plain, s.vpp == 1)


def _vpp_message(s: Sizes, _: Facts) -> str:
    if s.v_shaped:
        return f"schedules zbv and dualpipev hold two chunks per stage: use vpp=2, not vpp={s.vpp}"
    if s.interleaved and s.pp == 1:
        return "schedule interleaved-1f1b needs a pipeline: use pp=2 or more, or schedule 1f1b with vpp=1"
    if s.interleaved:
        return "schedule interleaved-1f1b needs two chunks per stage or more: use vpp=2 or schedule 1f1b"
    return f"vpp={s.vpp} needs schedule interleaved-1f1b (or zbv, dualpipev with vpp=2) and pp > 1; else use vpp=1"


CONSISTENCY = (
    Rule("batch", lambda s, _: s.global_batch % (s.dp * s.micro_batch) == 0, _batch_message),
    Rule(
        "experts divide a stage",
        lambda s, _: s.stage_ranks % (s.ep * s.expert_tp) == 0,
        lambda s, _: (
            f"ep={s.ep} x expert_tp={s.expert_tp} must divide the dp x cp x tp = {s.stage_ranks} ranks of a stage"
            + _try(s.ep, [d for d in divisors(s.stage_ranks) if s.stage_ranks % (d * s.expert_tp) == 0]).replace(
                "try", "try ep"
            )
        ),
    ),
    Rule(
        "virtual stages",
        _chunks_fit_schedule,
        _vpp_message,
    ),
    Rule(
        "shards",
        lambda s, _: (s.dp * s.cp) % s.zero_shards == 0,
        lambda s, _: (
            f"zero_shards={s.zero_shards} must divide dp x cp = {s.dp * s.cp}"
            + _try(s.zero_shards, divisors(s.dp * s.cp))
        ),
    ),
    Rule(
        "layer split",
        lambda s, _: s.layer_split is None or len(s.layer_split) == s.pp * s.vpp,
        lambda s, _: f"layer_split names {len(s.layer_split)} chunks, but pp={s.pp} x vpp={s.vpp} has {s.pp * s.vpp}",
    ),
)
"""What a configuration must obey by itself."""


def _heads_message(s: Sizes, f: Facts) -> str:
    assert f.model.heads is not None
    return f"tp={s.tp} does not divide {f.model.heads} attention heads{_try(s.tp, divisors(f.model.heads))}"


def _kv_message(s: Sizes, f: Facts) -> str:
    kv, heads = f.model.kv_heads, f.model.heads
    assert kv is not None
    valid = [t for t in divisors(heads or kv) if kv % t == 0 or t % kv == 0]
    return f"tp={s.tp} neither divides nor is a multiple of {kv} key-value heads{_try(s.tp, valid)}"


def _depth_message(s: Sizes, f: Facts) -> str:
    layers = f.model.layers
    assert layers is not None
    most = layers // s.vpp
    if s.vpp == 1:
        return f"pp={s.pp} has more stages than the model has layers ({layers}); use pp of at most {most}"
    fix = f"use pp of at most {most}" if most else "use a smaller vpp"
    return f"pp={s.pp} x vpp={s.vpp} = {s.pp * s.vpp} chunks, but the model has {layers} layers; {fix}"


def _experts_message(s: Sizes, f: Facts) -> str:
    experts = f.model.experts
    assert experts is not None
    if not experts:
        return f"the model has no experts: use ep=1, expert_tp=1 (got ep={s.ep}, expert_tp={s.expert_tp})"
    return f"ep={s.ep} does not divide {experts} experts{_try(s.ep, divisors(experts))}"


def _context_message(s: Sizes, f: Facts) -> str:
    seq = f.model.seq
    assert seq is not None
    valid = [1, *(d // 2 for d in divisors(seq) if d % 2 == 0)]
    return f"cp={s.cp} needs a sequence that divides by 2 x cp = {2 * s.cp}; {seq} does not{_try(s.cp, valid)}"


def _exchange_holds(s: Sizes, f: Facts) -> Any:
    exchanged = np.logical_and(s.heads_exchanged, s.cp > 1)
    return _implies(exchanged, f.model.heads % (s.tp * s.cp) == 0)


def _exchange_message(s: Sizes, f: Facts) -> str:
    assert f.model.heads is not None
    left = f.model.heads // s.tp
    return (
        f"cp={s.cp} with cp_variant all_to_all does not divide the {left} attention heads that tp={s.tp} leaves a rank"
        f"{_try(s.cp, divisors(left))}, or cp_variant ring"
    )


def _kv_left(s: Sizes, f: Facts) -> Any:
    """Key-value heads on a tp rank, at least the one that several of them share."""
    return np.maximum(f.model.kv_heads // s.tp, 1)


def _kv_exchange_holds(s: Sizes, f: Facts) -> Any:
    left = _kv_left(s, f)
    exchanged = np.logical_and(s.heads_exchanged, s.cp > 1)
    return _implies(exchanged, np.logical_or(left % s.cp == 0, s.cp % left == 0))


def _kv_exchange_message(s: Sizes, f: Facts) -> str:
    left = int(_kv_left(s, f))
    heads = (f.model.heads or left * s.tp) // s.tp
    valid = [c for c in divisors(heads) if left % c == 0 or c % left == 0]
    return (
        f"cp={s.cp} with cp_variant all_to_all neither divides nor is a multiple of the {left} key-value heads that "
        f"tp={s.tp} leaves a rank{_try(s.cp, valid)}, or cp_variant ring"
    )


def _sequence_message(s: Sizes, f: Facts) -> str:
    seq = f.model.seq
    assert seq is not None
    local = seq // s.cp
    return (
        f"sequence parallel splits the {local} tokens of a rank over tp={s.tp}, which does not divide them"
        f"{_try(s.tp, divisors(local))}, or leave sequence parallel out"
    )


def _world_message(s: Sizes, f: Facts) -> str:
    gpus = f.cluster.gpus
    assert gpus is not None
    model = s.pp * s.cp * s.tp
    text = f"dp={s.dp} x pp={s.pp} x cp={s.cp} x tp={s.tp} = {s.world} ranks, but there are {gpus} GPUs"
    if gpus % model == 0:
        return f"{text}; dp={gpus // model} fills them"
    sizes = [t for t in divisors(gpus) if gpus % (s.pp * s.cp * t) == 0]
    return (
        f"{text}; {gpus} divides into tp {_listed(sizes)} at pp={s.pp} x cp={s.cp}"
        if sizes
        else (f"{text}; pp x cp must divide {gpus}{_try(s.pp * s.cp, divisors(gpus))}")
    )


def _listed(numbers: list[int], most: int = 6) -> str:
    head = ", ".join(str(n) for n in numbers[:most])
    return head if len(numbers) <= most else f"{head} ..."


AGAINST_MODEL = (
    Rule("heads", lambda s, f: f.model.heads % s.tp == 0, _heads_message, ("heads",)),
    Rule(
        "key-value heads",
        lambda s, f: np.logical_or(f.model.kv_heads % s.tp == 0, s.tp % f.model.kv_heads == 0),
        _kv_message,
        ("kv_heads",),
    ),
    Rule(
        "MLP columns",
        lambda s, f: f.model.mlp_width % s.tp == 0,
        lambda s, f: (
            f"tp={s.tp} does not divide {f.model.mlp_width} MLP columns{_try(s.tp, divisors(f.model.mlp_width or 1))}"
        ),
        ("mlp_width",),
    ),
    Rule(
        "depth",  # a layer split that is spelled out may leave chunks empty (they hold the embedding or the head)
        lambda s, f: np.logical_or(s.pp * s.vpp <= f.model.layers, s.layer_split is not None),
        _depth_message,
        ("layers",),
    ),
    Rule(
        "layer split",
        lambda s, f: s.layer_split is None or sum(s.layer_split) == f.model.layers,
        lambda s, f: f"layer_split sums to {sum(s.layer_split)} layers, but the model has {f.model.layers}",
        ("layers",),
    ),
    Rule(
        "experts",
        lambda s, f: f.model.experts % s.ep == 0 if f.model.experts else np.logical_and(s.ep == 1, s.expert_tp == 1),
        _experts_message,
        ("experts",),
    ),
    Rule(
        "expert columns",
        lambda s, f: f.model.expert_width % s.expert_tp == 0,
        lambda s, f: (
            f"expert_tp={s.expert_tp} does not divide {f.model.expert_width} expert columns"
            + _try(s.expert_tp, divisors(f.model.expert_width or 1))
        ),
        ("expert_width",),
    ),
    Rule(
        "context",
        lambda s, f: _implies(s.cp > 1, f.model.seq % (2 * s.cp) == 0),
        _context_message,
        ("seq",),
    ),
    Rule("context heads", _exchange_holds, _exchange_message, ("heads",)),
    Rule("context key-value heads", _kv_exchange_holds, _kv_exchange_message, ("kv_heads",)),
    Rule(
        "sequence",
        lambda s, f: _implies(s.sequence_parallel, (f.model.seq // s.cp) % s.tp == 0),
        _sequence_message,
        ("seq",),
    ),
)
"""What a configuration must obey for a model (and its batch)."""

AGAINST_CLUSTER = (Rule("world", lambda s, f: s.world == f.cluster.gpus, _world_message, ("gpus",)),)
"""What a configuration must obey for a cluster."""
