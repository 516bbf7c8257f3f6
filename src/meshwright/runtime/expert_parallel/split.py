"""Which part of every stacked expert weight a rank holds: experts by ep, columns of each by expert_tp."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from meshwright.errors import InputError
from meshwright.runtime.expert_parallel.exchange import ExpertAxes
from meshwright.runtime.expert_parallel.module import ExpertParallelMoE, ExpertRegion
from meshwright.runtime.slices import TensorSlice


def split_experts(experts: nn.Module, name: str, region: ExpertRegion) -> ExpertParallelMoE:
    """`experts`: transformers' module of stacked weights, on the meta device; `name`: its full name."""
    if not experts.has_gate or experts.has_post_expert_norm:  # pyright: ignore[reportGeneralTypeIssues]
        raise InputError(f"{name}: experts without a gate, or with a norm of their own, cannot be run")
    return ExpertParallelMoE(experts, _slices(experts, name, region.axes), region)


def _slices(experts: nn.Module, name: str, axes: ExpertAxes) -> dict[str, TensorSlice]:
    shapes = {tensor: tuple(p.shape) for tensor, p in experts.named_parameters()}
    count = shapes["down_proj"][0]
    if count % axes.ep.size:
        raise InputError(f"ep={axes.ep.size} does not divide {count} experts ({name})")
    here = count // axes.ep.size
    mine = (axes.ep.rank * here, (axes.ep.rank + 1) * here)
    wide, narrow = (2, 1) if experts.is_transposed else (1, 2)  # dims of the experts' own width
    halves = bool(experts.is_concatenated) and axes.expert_tp.size > 1  # gate and up, one after the other
    found: dict[str, TensorSlice] = {}
    for tensor, shape in shapes.items():
        whole = TensorSlice(f"{name}.{tensor}", shape, experts=mine, on_tp_mesh=False)
        if axes.expert_tp.size == 1:
            found[tensor] = whole
        elif tensor == "down_proj_bias":
            found[tensor] = replace(whole, copy=axes.expert_tp.rank, copies=axes.expert_tp.size)
        elif tensor == "down_proj":
            found[tensor] = _columns(whole, narrow, (0, shape[narrow]), 1, axes)
        else:
            dim = 1 if tensor.endswith("_bias") else wide
            width = shape[dim] // 2
            if halves:
                found[tensor.replace("gate_up", "gate")] = _columns(whole, dim, (0, width), 1, axes)
                found[tensor.replace("gate_up", "up")] = _columns(whole, dim, (width, 2 * width), 1, axes)
            else:  # gate and up columns lie in pairs
                found[tensor] = _columns(whole, dim, (0, 2 * width), 2, axes)
    return found


def _columns(whole: TensorSlice, dim: int, block: tuple[int, int], unit: int, axes: ExpertAxes) -> TensorSlice:
    """This expert_tp rank's share of a block of columns, of which `unit` stay together."""
    ways, rank, width = axes.expert_tp.size, axes.expert_tp.rank, block[1] - block[0]
    if width % (unit * ways):
        raise InputError(f"expert_tp={ways} does not divide the {width // unit} columns of {whole.name}")
    each = width // ways
    start = block[0] + rank * each
    return replace(whole, dim=dim, start=start, stop=start + each, length=width)
