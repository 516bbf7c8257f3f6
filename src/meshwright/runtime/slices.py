"""Which part of which Hugging Face tensor a rank holds, and what its gradient still lacks after backward.

`TensorSlice` ties a local parameter to a run of rows (or columns) of one tensor of the unsharded model; initialisation,
safetensors, parity and checkpoints all read it. `GradientSum` names the sums that tensor parallelism leaves open.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor


class GradientSum(StrEnum):
    """Ranks over which the gradient of a parameter must still be summed after backward."""

    NONE = "none"
    TP = "tp"  # replicated weight that saw only this rank's heads or sequence shard
    KV = "kv"  # KV head held by several tp ranks


@dataclass(frozen=True)
class TensorSlice:
    """Elements start..stop-1 along `dim` of the tensor `name` of the Hugging Face model.

    `dim` None: the whole tensor. `copy` and `copies`: this is copy number `copy` of `copies` equal ones over tp.
    `length` is the sum of the slices of all tp ranks along `dim`: that of one block of a fused tensor, and more than
    the tensor has where slices are held in copies. `experts`: of stacked expert weights only these along dim 0.
    `on_tp_mesh` False: not placed on the tp mesh as a DTensor, though it is a part (experts, loose vectors).
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    start: int = 0
    stop: int = 0
    length: int = 0
    copy: int = 0
    copies: int = 1
    gradient_sum: GradientSum = GradientSum.NONE
    experts: tuple[int, int] | None = None
    on_tp_mesh: bool = True

    @property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """Start and stop along every dim."""
        found = [(0, length) for length in self.shape]
        if self.experts is not None:
            found[0] = self.experts
        if self.dim is not None:
            found[self.dim] = (self.start, self.stop)
        return tuple(found)

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.bounds)

    def of(self, full: Tensor) -> Tensor:
        """The slice as a view of the whole tensor."""
        for dim, (start, stop) in enumerate(self.bounds):
            if stop - start != self.shape[dim]:
                full = full.narrow(dim, start, stop - start)
        return full


def chunk_bounds(length: int, rank: int, size: int) -> tuple[int, int]:
    """Start and stop of this rank's piece when `length` is cut as torch.chunk cuts (last pieces short or empty)."""
    per_rank = -(-length // size)
    return min(rank * per_rank, length), min((rank + 1) * per_rank, length)
