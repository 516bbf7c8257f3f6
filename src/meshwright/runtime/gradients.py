"""After backward: the gradient sums that splitting left open, and the global gradient norm.

In: the local parameters of a rank with their data-parallel gradients. Three sums, each one flat all-reduce: replicated
weights over tp (norms under sequence parallelism, norms of heads), KV heads held in copies, and tied embeddings over
first and last stage. The norm counts every element of the model once, over all axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from meshwright.ledger import Phase
from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.process_groups import AxisGroup, ProcessGroupManager
from meshwright.runtime.slices import GradientSum
from meshwright.runtime.state import LocalParameter

REPLICATED = "replicated gradients"
KV_COPIES = "shared KV head gradients"
TIED = "tied embedding gradients"
NORM = "gradient norm"


def complete_gradients(parameters: Sequence[LocalParameter], groups: ProcessGroupManager) -> None:
    """Sum what is still partial, in place. Call once per step, after data parallelism has finished."""
    with groups.recorder.during(Phase.OPTIMIZER):
        sum_flat([p for p in parameters if p.sums_over is GradientSum.TP], groups.axis("tp"), REPLICATED)
        if "kv" in groups.axes:
            sum_flat([p for p in parameters if p.sums_over is GradientSum.KV], groups.axis("kv"), KV_COPIES)
        _sum_tied([p for p in parameters if p.tied], groups)


def scale_expert_gradients(parameters: Sequence[LocalParameter], groups: ProcessGroupManager) -> None:
    """Experts' gradients were averaged over their replicas, of which each saw the tokens of ep x expert_tp ranks; the
    others over dp x cp, of which each saw the tokens of tp ranks. Bring the former to the latter's scale."""
    config = groups.config
    factor = config.tp / (config.ep * config.expert_tp)
    if factor != 1.0:
        for parameter in parameters:
            if parameter.unit == "expert":
                gradient_of(parameter).mul_(factor)


def sum_flat(parameters: Sequence[LocalParameter], axis: AxisGroup, what: str) -> None:
    """All-reduce the gradients of the parameters over an axis as one tensor."""
    gradients = [gradient_of(p) for p in parameters]
    if not gradients or axis.size == 1:
        return
    flat = torch.cat([g.reshape(-1) for g in gradients])
    all_reduce(flat, axis, what)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view(gradient.shape))


def _sum_tied(copies: Sequence[LocalParameter], groups: ProcessGroupManager) -> None:
    if len(copies) == 2:  # first and last chunk on one stage
        first, last = (gradient_of(p) for p in copies)
        first.add_(last)
        last.copy_(first)
    elif copies and "embedding" in groups.axes:
        sum_flat(copies, groups.axis("embedding"), TIED)


def gradient_of(parameter: LocalParameter) -> Tensor:
    if parameter.gradient is None:
        raise RuntimeError(f"{parameter.name} has no gradient: data parallelism has not finished the step")
    return parameter.gradient


def global_norm(parameters: Sequence[LocalParameter], groups: ProcessGroupManager, sharded: bool) -> Tensor:
    """The 2-norm of the whole model's gradient, equal on all ranks. `sharded`: state is spread over dp."""
    counted = [p for p in parameters if p.counts_in_norm and not p.second_copy]
    dense = _squares([p for p in counted if p.unit != "expert"], groups.device.torch)
    with groups.recorder.during(Phase.OPTIMIZER):
        for axis in ("tp", "zero_shard") if sharded else ("tp",):
            all_reduce(dense, groups.axis(axis), NORM)
        total = dense + _experts_square(counted, groups, sharded) if "expert_shard" in groups.axes else dense
        all_reduce(total, groups.axis("pp"), NORM)
    return total.sqrt()


def _experts_square(counted: Sequence[LocalParameter], groups: ProcessGroupManager, sharded: bool) -> Tensor:
    square = _squares([p for p in counted if p.unit == "expert"], groups.device.torch)
    for axis in ("ep", "expert_tp", "expert_shard") if sharded else ("ep", "expert_tp"):
        all_reduce(square, groups.axis(axis), NORM)
    return square


def _squares(parameters: Sequence[LocalParameter], device: torch.device) -> Tensor:
    squares = [torch.linalg.vector_norm(gradient_of(p)).double().square() for p in parameters]
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)


def clip(parameters: Sequence[LocalParameter], norm: Tensor, limit: float) -> None:
    """Scale all gradients so that their global norm is at most `limit`."""
    scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
    for parameter in parameters:
        gradient_of(parameter).mul_(scale.to(gradient_of(parameter).dtype))
