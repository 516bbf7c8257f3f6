"""How far an estimate may be trusted: what each constant behind it rests on, and the range that the step and the memory
lie in.

In: model, cluster, workload, configuration, stack. Out: `Confidence`. The range is the spread that published runs
showed around predictions that had not seen them (`data/spread.toml`, written by `make accuracy`): of other runs with
the same devices and software where all constants that weigh were measured there, else of families left out whole.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.resources import files
from typing import Any

from meshwright.cost.device import NARROW, device_for
from meshwright.cost.fitted import evidence
from meshwright.cost.stack import Stack, fitted_as
from meshwright.cost.workload import Workload
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import ContextVariant, HybridParallelConfig, Schedule
from meshwright.models.spec import Attention, ModelSpec, MoeMlp

Range = tuple[float, float]


class Source(StrEnum):
    """Where a constant comes from."""

    MEASURED = "measured"  # fitted to published runs of this device architecture or this software
    INTERPOLATED = "interpolated"  # fitted to runs of the main release of this software, or of the whole network
    ASSUMED = "assumed"  # a data sheet, a paper, or the value of the generic stack


@dataclass(frozen=True)
class Input:
    """One constant that an estimate rests on, in words; `evidence` says how it is known."""

    name: str
    source: Source
    evidence: str


@dataclass(frozen=True)
class Confidence:
    """`source` is that of the weakest input that weighs (KERNELS). Four of five published runs lie in each range."""

    source: Source
    inputs: tuple[Input, ...]
    step_s: Range
    memory_bytes: Range


KERNELS = ("matrix products", "attention", "memory bandwidth", "element-wise work")
"""What takes most of a step on any split: where one of these is assumed, so is the estimate."""


def confidence(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    config: HybridParallelConfig,
    stack: Stack,
    step_s: float,
    memory_bytes: float,
) -> Confidence:
    """What the estimate of one configuration rests on."""
    inputs = (
        *_device_inputs(model, cluster, workload, config, stack),
        *_stack_inputs(model, config, stack),
        *_network_inputs(cluster, config),
    )
    weighs = [one.source for one in inputs if one.name in KERNELS]
    source = max(weighs, key=list(Source).index)
    kind = "moe" if any(isinstance(k.mlp, MoeMlp) for k in model.kinds) else "dense"
    table = _spread()
    low, high = table["step"][kind]["known" if source is not Source.ASSUMED else "unknown"]
    least, most = table["memory"]["all"]
    return Confidence(source, inputs, (step_s * low, step_s * high), (memory_bytes * least, memory_bytes * most))


@cache
def _spread() -> dict[str, Any]:
    text = files("meshwright.cost").joinpath("data/spread.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _device_inputs(
    model: ModelSpec, cluster: Cluster, workload: Workload, config: HybridParallelConfig, stack: Stack
) -> Iterable[Input]:
    chip = cluster.accelerator.architecture
    known = evidence("device", device_for(chip).name) if device_for(chip).name == chip else {}
    used = {"matrix products": "gemm_fp8" if config.precision in NARROW else "gemm", "memory bandwidth": "memory"}
    if any(isinstance(kind.mixer, Attention) for kind in model.kinds):
        kernel = (workload.attention or stack.attention) if workload.flash_attention else "none"
        used["attention"] = "softmax_passes" if kernel == "none" else f"attention.{kernel}"
    for name, constant in used.items():
        if constant in known:
            yield Input(name, Source.MEASURED, f"{constant} of {chip}: {known[constant]}")
        else:
            yield Input(name, Source.ASSUMED, f"{constant} of {chip}: no run in the fit tells")


def _stack_inputs(model: ModelSpec, config: HybridParallelConfig, stack: Stack) -> Iterable[Input]:
    interleaved = config.schedule is not Schedule.GPIPE and config.vpp > 1
    used = {"element-wise work": "elementwise_passes", "launching kernels": "layer_host_s"}
    used |= {"overlap of tp": "tp_overlap"} if config.tp > 1 else {}
    ring = config.cp > 1 and config.cp_variant is ContextVariant.RING  # an exchange of heads hides behind nothing
    used |= {"overlap of cp": "cp_overlap"} if ring else {}
    used |= {"overlap of ep": "ep_overlap"} if config.ep > 1 else {}
    used |= {"overlap of pp": "pp_overlap_interleaved" if interleaved else "pp_overlap"} if config.pp > 1 else {}
    used |= {"overlap of dp": _dp_overlap(config, stack)} if config.dp > 1 else {}
    used |= {"stalled messages": "message_stall_s"} if config.pp > 1 and stack.stalls else {}
    used |= {"optimizer step": "optimizer_passes"}
    used |= {"slow ranks at scale": "straggler"} if config.world_size > 1 else {}
    if any(isinstance(kind.mlp, MoeMlp) for kind in model.kinds):
        used |= {"expert permutation": "permute_passes"}
    for name, trait in used.items():
        owner = fitted_as(stack, trait)
        known = evidence("stack", owner).get(trait)
        if known is None:
            yield Input(
                name, Source.ASSUMED, f"{trait} of {stack.name}: {stack.sources.get(trait, 'as data/stacks.toml')}"
            )
        elif owner == stack.name:
            yield Input(name, Source.MEASURED, f"{trait} of {owner}: {known}")
        else:
            yield Input(name, Source.INTERPOLATED, f"{trait} of {owner}, which {stack.name} shares: {known}")


def _dp_overlap(config: HybridParallelConfig, stack: Stack) -> str:
    """The trait that says how much of a replica's traffic hides."""
    if config.zero == 3:
        return "fsdp_overlap"
    return "ddp_overlap" if config.zero == 0 and stack.ddp_overlap > stack.dp_overlap else "dp_overlap"


def _network_inputs(cluster: Cluster, config: HybridParallelConfig) -> Iterable[Input]:
    """Links are as the catalogue or the user's own file states them; what the library adds is fitted over all runs."""
    if config.world_size == 1:
        return
    known = evidence("network", "network")
    for name, link in (("fast links", cluster.intra), ("network", cluster.inter)):
        if name == "network" and config.world_size <= cluster.domain:
            continue
        measured = "measured" in link.source.lower() or "nccl-tests" in link.source.lower()
        yield Input(
            name, Source.MEASURED if measured else Source.ASSUMED, link.source or f"{link.name}: no source given"
        )
    if "call_s" in known:
        yield Input("collective library", Source.INTERPOLATED, f"start of a call, over all clusters: {known['call_s']}")


__all__ = ["Confidence", "Input", "Source", "confidence"]
