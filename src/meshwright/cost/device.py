"""How much of an accelerator's data sheet its kernels reach: few constants per architecture generation, and the
constants of the network that no link sheet prints.

In: the architecture name of an Accelerator. Out: frozen `Device` and `Network`. Values, dates and evidence are in
`data/devices.toml`.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib.resources import files
from typing import Any, cast

from meshwright.cost.collectives import Network
from meshwright.cost.fitted import evidence, fitted_values
from meshwright.errors import InputError, suggestion
from meshwright.hardware.spec import Accelerator
from meshwright.layout.config import Precision


@dataclass(frozen=True)
class Device:
    """Shares of peak that kernels of an architecture reach, shapes of their tiles, seconds of a launch."""

    name: str = "generic"
    gemm: float = 0.8  # share of the 16-bit peak of a large, well-shaped product
    gemm_fp8: float = 0.65  # the same of the 8-bit peak (and of the 4-bit one)
    tiles: tuple[tuple[int, int], ...] = ((128, 256), (128, 128), (64, 128))
    small_tile: float = 0.85  # efficiency of each smaller tile relative to the one before
    k_half: float = 200.0  # product depth that a tile loses to filling and draining its pipeline
    quantisation: float = 0.7  # how much of the idle part of the last wave is lost (1: all, 0: perfect stream-k)
    misaligned: float = 0.75  # efficiency of products with a side that is no multiple of 64 elements
    memory: float = 0.8  # share of memory bandwidth that streaming kernels reach
    attention: dict[str, float] = field(
        default_factory=lambda: {"none": 0.4, "flash1": 0.35, "flash2": 0.5, "flash3": 0.6, "cudnn": 0.6}
    )  # share of the 16-bit peak, forward pass
    attention_backward: float = 0.8  # efficiency of the backward kernel relative to the forward one
    attention_half_seq: float = 512.0  # sequence at which a flash kernel reaches half of its share
    attention_head_power: float = 0.5  # loss of narrow heads: (v_dim / 128) ** power
    softmax_passes: float = 1.0  # memory traffic of unfused softmax relative to one fused kernel
    launch_s: float = 3e-6  # gap on the device between kernels
    scan: float = 0.1  # share of the 16-bit peak of chunked linear-attention and state-space kernels
    sources: dict[str, str] = field(default_factory=dict[str, str])


@cache
def _tables() -> dict[str, dict[str, Any]]:
    text = files("meshwright.cost").joinpath("data/devices.toml").read_text(encoding="utf-8")
    return cast(dict[str, dict[str, Any]], tomllib.loads(text))


def _traits(name: str) -> dict[str, Any]:
    """The values of an architecture, over those of the one it inherits from (`base`)."""
    own = dict(_tables()[name])
    base = own.pop("base", None)
    inherited = _traits(base) if base else {}
    default = Device().attention
    attention = {**inherited.get("attention", default), **own.get("attention", {})}
    merged = {**inherited, **own}
    return {**merged, "attention": attention} if attention else merged


def _fitted(name: str) -> dict[str, float]:
    """What a fit found for an architecture, over what it found for the one it refines: a generation without runs of its
    own reaches what the one before it reached. The generic table is no generation."""
    base = _tables()[name].get("base", "generic")
    before = {} if base == "generic" else _fitted(base)
    return {**before, **fitted_values("device", name)}


@cache
def device_for(architecture: str, fitted: bool = True) -> Device:
    """The constants of an architecture, fitted ones over assumed; the generic ones where the file has no entry."""
    name = architecture if architecture in _tables() and architecture != "network" else "generic"
    traits = _traits(name)
    found = _fitted(name) if fitted else {}
    kernels = {key.partition(".")[2]: value for key, value in found.items() if key.startswith("attention.")}
    traits |= {key: value for key, value in found.items() if not key.startswith("attention.")}
    if kernels:
        traits["attention"] = {**traits.get("attention", Device().attention), **kernels}
    if unknown := set(traits) - {f.name for f in fields(Device)}:
        raise ValueError(f"devices.toml: unknown constants {sorted(unknown)} of {name}")
    if "tiles" in traits:
        traits["tiles"] = tuple((int(m), int(n)) for m, n in traits["tiles"])
    sources = {**traits.pop("sources", {}), **(evidence("device", name) if fitted else {})}
    return Device(name=name, sources=sources, **{key: value for key, value in traits.items() if key != "name"})


def device_of(accelerator: Accelerator) -> Device:
    """The constants of an accelerator: its architecture's, under those measured on the device itself."""
    device = device_for(accelerator.architecture)
    if not accelerator.kernels:
        return device
    known = [f.name for f in fields(Device) if f.type == "float"]
    for name in accelerator.kernels:
        if name not in known:
            hint = suggestion(name, known) or f"; known: {', '.join(known)}"
            raise InputError(f"{accelerator.name}: unknown constant kernels.{name}{hint}")
    measured: dict[str, Any] = dict(accelerator.kernels)
    return replace(device, **measured)


@cache
def network(fitted: bool = True) -> Network:
    """The constants of the network."""
    traits: dict[str, Any] = {key: value for key, value in _tables()["network"].items() if key != "sources"}
    traits |= fitted_values("network", "network") if fitted else {}
    return Network(**traits)


NARROW = (Precision.FP8, Precision.MXFP8, Precision.NVFP4)
"""Formats whose products run below 16 bits; the rest of the layer stays in 16 bits."""

PEAK_KEYS: dict[Precision, tuple[str, ...]] = {
    Precision.FP32: ("tf32", "fp32"),
    Precision.FP16: ("fp16", "bf16"),
    Precision.BF16: ("bf16", "fp16"),
    Precision.FP8: ("fp8",),
    Precision.MXFP8: ("mxfp8", "fp8"),
    Precision.NVFP4: ("nvfp4", "fp4"),
}
"""Names under which a data sheet may list the units that a format runs on, best first."""


def peak_flops(accelerator: Accelerator, precision: Precision) -> float:
    """Dense peak FLOP/s of a format; an InputError where the accelerator has no units for it."""
    for key in PEAK_KEYS[precision]:
        if key in accelerator.peak_flops:
            return accelerator.peak_flops[key]
    return accelerator.peak(precision.value)
