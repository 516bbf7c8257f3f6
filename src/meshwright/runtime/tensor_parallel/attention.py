"""Attention as one sequence-parallel module: [b, s/tp, h] in and out, heads split over tp inside.

One all-gather and one reduce-scatter of the sequence each way (Korthikanti et al. 2022, figure 5), KV heads replicated
where tp exceeds them. For models of Hugging Face, `parallelize` hooks their own attention instead.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright.errors import InputError
from meshwright.runtime.process_groups import AxisGroup
from meshwright.runtime.slices import GradientSum, TensorSlice
from meshwright.runtime.tensor_parallel.entering import enter
from meshwright.runtime.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from meshwright.runtime.tensor_parallel.region import TensorParallelRegion


def head_slice(name: str, shape: tuple[int, ...], heads: int, axis: AxisGroup, dim: int = 0) -> TensorSlice:
    """This tp rank's heads along `dim` of a tensor; heads fewer than ranks are held by several."""
    width = shape[dim] // heads
    if heads % axis.size == 0:
        per_rank = heads // axis.size * width
        return TensorSlice(name, shape, dim, axis.rank * per_rank, (axis.rank + 1) * per_rank, shape[dim])
    if axis.size % heads:
        raise InputError(f"tp={axis.size} neither divides {heads} heads nor is a multiple of them")
    copies = axis.size // heads
    head = axis.rank // copies
    start, stop = head * width, (head + 1) * width
    length = width * axis.size
    return TensorSlice(name, shape, dim, start, stop, length, axis.rank % copies, copies, GradientSum.KV)


class SequenceParallelAttention(nn.Module):
    """Causal self-attention without biases or position embedding; parameters named as Llama's."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, head_dim: int, axis: AxisGroup) -> None:
        super().__init__()
        if heads % axis.size:
            raise InputError(f"tp={axis.size} does not divide {heads} attention heads")
        self.head_dim = head_dim
        self.region = TensorParallelRegion(axis, sequence_parallel=True)

        def column(name: str, count: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(
                {"weight": head_slice(f"{name}.weight", (count * head_dim, hidden), count, axis)}
            )

        self.q_proj = column("q_proj", heads)
        self.k_proj = column("k_proj", kv_heads)
        self.v_proj = column("v_proj", kv_heads)
        rows = head_slice("o_proj.weight", (hidden, heads * head_dim), heads, axis, dim=1)
        self.o_proj = RowParallelLinear({"weight": rows}, self.region)

    def forward(self, hidden_states: Tensor) -> Tensor:
        entered = enter(hidden_states, (self.q_proj, self.k_proj, self.v_proj), self.region)
        batch, seq = entered.shape[:2]
        q, k, v = (
            projection(entered).view(batch, seq, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(torch.flatten(mixed.transpose(1, 2), 2))
