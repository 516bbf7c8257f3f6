"""Parameters of the fit: which traits of which engine move, and between which bounds.

In: offsets, one per trait and engine. Out: `ServingStack`s. A trait is a number on a log scale. An engine without a base
is offset from the assumed value; a release is offset from the release it is based on, and pulled to it: what few rows do
not tell apart stays equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.serving_stack import ServingStack, serving_bases, serving_stacks

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Range:
    """Bounds of a trait, and how far (as a logarithm) a fit moves it per unit of cost."""

    low: float
    high: float
    sigma: float = 0.5


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
    "elementwise_passes": Range(0.3, 12.0, 0.5),
    "occupancy": Range(0.8, 1.0, 0.03),
}
RELEASE_SIGMA = 0.5
"""A release's offset from the one before it, relative to the sigma of the assumed value."""


@dataclass(frozen=True)
class Parameter:
    """One trait of one engine."""

    owner: str
    field: str

    @property
    def range(self) -> Range:
        return RANGES[self.field]

    @property
    def sigma(self) -> float:
        return self.range.sigma * (1.0 if serving_bases()[self.owner] is None else RELEASE_SIGMA)

    @property
    def label(self) -> str:
        return f"{self.owner}.{self.field}"


def lineage(name: str) -> list[str]:
    """The engine and those it is based on, the last first."""
    before = serving_bases()[name]
    return [name] if before is None else [name, *lineage(before)]


def parameters(engines: Iterable[str]) -> list[Parameter]:
    """Every trait of the engines that have rows and of those they are based on."""
    owners = {owner for name in engines for owner in lineage(name)}
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


assert set(RANGES) <= {f.name for f in fields(ServingStack)}
