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
    the tensor has where slices are held in copies.
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

    @property
    def local_shape(self) -> tuple[int, ...]:
        if self.dim is None:
            return self.shape
        return (*self.shape[: self.dim], self.stop - self.start, *self.shape[self.dim + 1 :])

    def of(self, full: Tensor) -> Tensor:
        """The slice as a view of the whole tensor."""
        return full if self.dim is None else full.narrow(self.dim, self.start, self.stop - self.start)


def chunk_bounds(length: int, rank: int, size: int) -> tuple[int, int]:
    """Start and stop of this rank's piece when `length` is cut as torch.chunk cuts (last pieces short or empty)."""
    per_rank = -(-length // size)
    return min(rank * per_rank, length), min((rank + 1) * per_rank, length)
