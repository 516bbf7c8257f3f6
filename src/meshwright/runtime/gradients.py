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
    counted = [gradient_of(p) for p in parameters if p.counts_in_norm and not p.second_copy]
    device = groups.device.torch
    squares = [torch.linalg.vector_norm(g).double().square() for g in counted]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
    axes = ["tp", "pp", *(["zero_shard"] if sharded else [])]
    with groups.recorder.during(Phase.OPTIMIZER):
        for axis in axes:
            all_reduce(total, groups.axis(axis), NORM)
    return total.sqrt()


def clip(parameters: Sequence[LocalParameter], norm: Tensor, limit: float) -> None:
    """Scale all gradients so that their global norm is at most `limit`."""
    scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
    for parameter in parameters:
        gradient_of(parameter).mul_(scale.to(gradient_of(parameter).dtype))
