"""Parameters of the fit: which traits of which engine move, and between which bounds.

In: offsets, one per trait and engine. Out: `ServingStack`s. A trait moves on a log scale. An engine without a base is
offset from its assumed values; a release is offset from the release it is based on, and pulled to it: what its own rows
do not tell stays as it was. A rewrite is pulled to it no more than to assumed values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.serving_stack import ServingStack, serving_bases, serving_stacks

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Range:
    """Bounds of a trait, and how far (as a logarithm) a fit moves it from what was assumed per unit of cost."""

    low: float
    high: float
    sigma: float


RANGES: dict[str, Range] = {
    "gemm": Range(0.2, 1.3, 0.2),
    "gemm_fp8": Range(0.5, 1.6, 0.15),
    "gemm_fp4": Range(0.3, 1.6, 0.3),
    "upcast": Range(0.05, 1.2, 0.7),
    "expert_gemm": Range(0.1, 1.2, 0.5),
    "expert_imbalance": Range(1.0, 30.0, 0.7),
    "stream": Range(0.4, 1.2, 0.15),
    "cache_stream": Range(0.2, 2.0, 0.3),
    "kernel_s": Range(3e-7, 3e-5, 0.5),
    "step_host_s": Range(2e-5, 1e-2, 1.0),
    "sequence_host_s": Range(1e-6, 2e-4, 1.0),
    "reduce_call_s": Range(1e-6, 6e-5, 0.5),
    "permute_passes": Range(0.2, 20.0, 0.7),
    "elementwise_passes": Range(0.3, 20.0, 0.5),
    "occupancy": Range(0.8, 1.0, 0.03),
}
RELEASE = 0.3
"""How far a release moves from the one before it, relative to how far that one moves from what was assumed."""


@dataclass(frozen=True)
class Parameter:
    """One trait of one engine."""

    owner: str
    field: str

    @property
    def sigma(self) -> float:
        alone = serving_bases()[self.owner] is None or serving_stacks(fitted=False)[self.owner].rewrite
        return RANGES[self.field].sigma * (1.0 if alone else RELEASE)


def lineage(name: str) -> list[str]:
    """The engine and those it is based on, itself first."""
    before = serving_bases()[name]
    return [name] if before is None else [name, *lineage(before)]


def parameters(names: Iterable[str]) -> list[Parameter]:
    """Every trait of these engines and of those they are based on."""
    owners = {owner for name in names for owner in lineage(name)}
    return [Parameter(name, field) for name in serving_bases() if name in owners for field in RANGES]


def engines(chosen: Sequence[Parameter], offsets: FloatArray) -> dict[str, ServingStack]:
    """All engines with their traits at these offsets."""
    own: dict[str, dict[str, float]] = {}
    for parameter, offset in zip(chosen, offsets.tolist(), strict=True):
        own.setdefault(parameter.owner, {})[parameter.field] = offset
    return {name: _moved(stack, own) for name, stack in serving_stacks(fitted=False).items()}


def _moved(stack: ServingStack, own: Mapping[str, Mapping[str, float]]) -> ServingStack:
    values: dict[str, float] = {}
    for field, r in RANGES.items():
        offset = sum(own.get(owner, {}).get(field, 0.0) for owner in lineage(stack.name))
        values[field] = float(np.clip(getattr(stack, field) * np.exp(offset), r.low, r.high))
    return replace(stack, **values)


def offsets_of(chosen: Sequence[Parameter], found: Mapping[str, ServingStack]) -> FloatArray:
    """The offsets at which engines have these traits."""
    assumed, bases = serving_stacks(fitted=False), serving_bases()

    def from_assumed(name: str | None, field: str) -> float:
        return 0.0 if name is None else float(np.log(getattr(found[name], field) / getattr(assumed[name], field)))

    return np.array([from_assumed(p.owner, p.field) - from_assumed(bases[p.owner], p.field) for p in chosen])


def within(chosen: Sequence[Parameter], offsets: FloatArray) -> FloatArray:
    """The offsets held where the bounds of the traits are: beyond them nothing would change, and the rows would seem to
    say nothing about a trait."""
    return offsets_of(chosen, engines(chosen, offsets))


def shipped(chosen: Sequence[Parameter]) -> FloatArray:
    """Offsets of the traits as the data files hold them."""
    return offsets_of(chosen, serving_stacks())
