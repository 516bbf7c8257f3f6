"""Serving stacks: what an inference engine adds to the hardware's roofline - launches, host time, cache share, limits.

In: the name of an engine as a person or a measurement row writes it. Out: a frozen `ServingStack`. The values live in
`data/serving_stacks.toml` (what an engine does, what is assumed) and `data/serving_fitted.toml` (what a fit found).
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.resources import files
from typing import Any, cast

STACKS, FITTED = "serving_stacks.toml", "serving_fitted.toml"


@dataclass(frozen=True)
class ServingStack:
    """Traits of one engine. Shares are 0..1, seconds are per call."""

    name: str = "generic"
    frameworks: tuple[str, ...] = ()  # lower-case words by which an engine's name is recognised
    rewrite: bool = False  # another program than its base: a fit pulls it no closer to that than to assumed values
    gemm: float = 1.0  # products relative to the architecture's own surface
    gemm_fp8: float = 1.0  # 8-bit products relative to the architecture's own 8-bit share
    gemm_fp4: float = 1.0  # 4-bit products relative to the same share of the 4-bit peak
    upcast: float = 1.0  # products whose weights the kernel dequantises to 16 bits, relative to others
    expert_gemm: float = 1.0  # grouped products of experts relative to dense ones
    expert_imbalance: float = 1.0  # routed tokens of the busiest expert over the mean
    stream: float = 1.0  # memory streaming of weights and cache relative to the architecture's own share
    cache_stream: float = 0.8  # decoding attention's bandwidth over the cache relative to streaming weights
    layer_kernels: int = 12  # kernels of a layer's forward pass, each with a launch gap
    kernel_s: float = 2e-6  # the gap between two kernels (graph launch)
    step_host_s: float = 2e-4  # host time per forward pass that compute does not hide
    sequence_host_s: float = 0.0  # host time per sequence of a pass: scheduling, sampling, detokenisation
    host_overlap: bool = False  # that time runs beside the device's (not where a pipeline needs it between passes)
    reduce_call_s: float = 8e-6  # start of one tensor-parallel all-reduce
    elementwise_passes: float = 1.0
    permute_passes: float = 1.0  # traffic of moving tokens to experts and back, relative to one reading and writing
    cache_share: float = 0.9  # of the memory left after weights and workspace
    max_tokens: int = 8192  # tokens of one forward pass
    max_sequences: int = 2048  # sequences of one forward pass and replica
    occupancy: float = 0.95  # share of the cache's sequences in flight at saturation
    sources: dict[str, str] = field(default_factory=dict[str, str])


@cache
def _tables(file: str) -> dict[str, dict[str, Any]]:
    path = files("meshwright.cost").joinpath(f"data/{file}")
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@cache
def serving_bases() -> dict[str, str | None]:
    """Every engine, in the file's order, and the one whose traits it inherits."""
    return {name: table.get("base") for name, table in _tables(STACKS).items()}


@cache
def serving_stacks(fitted: bool = True) -> dict[str, ServingStack]:
    """Every engine by name, traits that a fit found over assumed ones; a release inherits those of its base."""
    known = {f.name for f in fields(ServingStack)}
    found = _tables(FITTED) if fitted else {}
    resolved: dict[str, dict[str, Any]] = {}
    for name, table in _tables(STACKS).items():
        base = resolved[table["base"]] if "base" in table else {}
        own: dict[str, Any] = {key: value for key, value in table.items() if key != "base"}
        if "frameworks" in own:
            own["frameworks"] = tuple(cast(list[str], own["frameworks"]))
        own |= found.get("engine", {}).get(name, {})
        if unknown := set(own) - known:
            raise ValueError(f"{STACKS} or {FITTED}: unknown trait {sorted(unknown)} in {name}")
        sources = {**base.get("sources", {}), **found.get("evidence", {}).get(name, {})}
        resolved[name] = {**base, "frameworks": (), "rewrite": False, **own, "name": name, "sources": sources}
    return {name: ServingStack(**traits) for name, traits in resolved.items()}


def serving_stack_for(framework: str) -> ServingStack:
    """The engine whose longest recognising word occurs in `framework`; vLLM's traits where none does."""
    text = framework.lower()
    best, length = "vllm", 0
    for name, stack in serving_stacks().items():
        for word in stack.frameworks:
            if word in text and len(word) > length:
                best, length = name, len(word)
    return serving_stacks()[best]
