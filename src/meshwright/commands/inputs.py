"""Options turned into what the rooms take: a cluster, a workload, a configuration.

In: parsed options. Out: dataclasses.
Anything that cannot be is an InputError here, before a room is asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from math import prod

from meshwright.cost.stack import Stack
from meshwright.errors import InputError, suggestion
from meshwright.hardware import Cluster
from meshwright.layout.config import AXES, V_SHAPED, HybridParallelConfig, Schedule
from meshwright.models.spec import ModelSpec

GIB = 2**30
MOST_DIGITS = 8
"""Sizes longer than this are slips; the rooms say which of the shorter ones are too large."""


def load_cluster(
    name: str | None,
    *,
    nodes: int | None = None,
    gpus: int | None = None,
    gpus_per_node: int | None = None,
    reserved_gib: float | None = None,
) -> Cluster:
    """The cluster that --cluster and its companions describe."""
    from meshwright import hardware

    if name is None:
        raise InputError("which cluster? give --cluster NAME (see: meshwright clusters)")
    return hardware.load(
        name, nodes=nodes, gpus=gpus, gpus_per_node=gpus_per_node, reserved_bytes=reserved_bytes(reserved_gib)
    )


def reserved_bytes(gib: float | None) -> int | None:
    if gib is None:
        return None
    if not math.isfinite(gib) or gib > 2**20:
        raise InputError(f"--reserved-gib {gib} is not an amount of memory; give GiB, like 2.5")
    return round(gib * GIB)


def config_of(base: HybridParallelConfig, **given: object) -> HybridParallelConfig:
    """`base` with the options that were given (not None). Sizes that one schedule implies are filled in."""
    values = {name: value for name, value in given.items() if value is not None}
    schedule, vpp = values.get("schedule"), values.get("vpp")
    if isinstance(vpp, int) and vpp > 1 and schedule is None and base.schedule is Schedule.ONE_F_ONE_B:
        values["schedule"] = Schedule.INTERLEAVED
    if vpp is None and base.vpp == 1 and schedule in (Schedule.INTERLEAVED, *V_SHAPED):
        values["vpp"] = 2
    return replace(base, **values)


def configured(base: HybridParallelConfig, gpus: int, given: Mapping[str, object]) -> HybridParallelConfig:
    """`base` with the options that were given, filling `gpus` exactly; dp left out is as many replicas as fit."""
    axes = {axis: given.get(axis) or getattr(base, axis) for axis in AXES}
    model = prod(size for axis, size in axes.items() if axis != "dp" and isinstance(size, int))
    if given.get("dp") is None:
        if gpus % model:
            raise InputError(
                f"{_sizes(axes, without='dp')} = {model} ranks do not divide {gpus} GPUs; change a size, or --gpus"
            )
        axes["dp"] = gpus // model
    config = config_of(base, **{**given, **axes})
    if config.world_size != gpus:
        raise InputError(
            f"{_sizes(axes)} = {config.world_size} ranks, but there are {gpus} GPUs; leave out --dp, or give --gpus "
            f"{config.world_size}"
        )
    return config


def _sizes(axes: Mapping[str, object], without: str = "") -> str:
    return " x ".join(f"{axis} {size}" for axis, size in axes.items() if axis != without and size != 1) or "one rank"


def load_model(name: str) -> ModelSpec:
    """The model of a catalogue name, a path, or a hub id."""
    from meshwright import models

    return models.load(name)


def load_stack(name: str | None) -> Stack:
    """The software stack of an exact name; the default one where none is given."""
    from meshwright.cost.stack import default_stack, stacks

    if name is None:
        return default_stack()
    known = stacks()
    if name.lower() not in known:
        hint = suggestion(name, known) or f"; known: {', '.join(sorted(known))}"
        raise InputError(f"unknown software stack {name!r}{hint}")
    return known[name.lower()]


def sizes(option: str, text: str | None) -> tuple[int, ...] | None:
    """'4,8' -> (4, 8): the sizes that a search may use."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and len(word) <= MOST_DIGITS for word in words):
        raise InputError(f"{option} {text!r} is not a size; give a whole number, or several like 4,8")
    return tuple(sorted({int(word) for word in words}))


def milliseconds(option: str, value: float | None) -> float | None:
    """Milliseconds to seconds; a limit must be a positive number."""
    if value is None:
        return None
    if not math.isfinite(value) or value <= 0:
        raise InputError(f"{option} {value:g} is not a time; give milliseconds above zero")
    return value / 1000


def needed(option: str, value: int | None, example: int) -> int:
    """A value that has no sensible default."""
    if value is None:
        raise InputError(f"{option} is missing; give it, like {option} {example}")
    return value
