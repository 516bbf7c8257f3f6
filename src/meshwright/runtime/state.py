"""The trainable state of a rank as plain local tensors: what the optimizer, the norm and the checkpoint work on.

A live parameter may be a tensor, a DTensor on tp, or a DTensor on dp x tp that FSDP2 owns; its local tensor is what
this rank stores. `LocalParameter` ties it to its slice of the Hugging Face model, its fp32 master (or itself), and its
gradient. Working on local tensors avoids DTensor dispatch in every optimizer operation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meshwright.runtime.slices import GradientSum, TensorSlice


@dataclass
class LocalParameter:
    """One parameter of one chunk. `unit` is 'layer', 'expert' (routed), or 'ends' for embedding, final norm and head.

    `rows`: the part of the local slice along `shard_dim` that FSDP leaves on this rank. `master` is what the optimizer
    steps (aliases the live weight unless that is narrower than fp32). `gradient` is set by data parallelism at the end
    of backward. `tied` marks copies that several chunks hold.
    """

    name: str
    chunk: int
    unit: str
    live: nn.Parameter
    slice: TensorSlice
    rows: tuple[int, int]
    master: Tensor
    tied: bool = False
    gradient: Tensor | None = None
    shard_dim: int = 0

    @property
    def local(self) -> Tensor:
        return local_tensor(self.live)

    @property
    def counts_in_norm(self) -> bool:
        """Whether this rank's copy is the one that global sums over tp see."""
        return self.slice.copy == 0

    @property
    def second_copy(self) -> bool:
        """The copy of tied embeddings that the last chunk holds beside the first chunk's."""
        return self.tied and self.name == "lm_head.weight"

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where this rank's part begins in the whole tensor of the Hugging Face model."""
        offsets = [start for start, _ in self.slice.bounds]
        if offsets:
            offsets[self.shard_dim] += self.rows[0]
        return tuple(offsets)

    @property
    def sums_over(self) -> GradientSum:
        return self.slice.gradient_sum

    def of(self, full: Tensor) -> Tensor:
        """This rank's part of the whole tensor of the Hugging Face model."""
        start, stop = self.rows
        piece = self.slice.of(full)
        return piece.narrow(self.shard_dim, start, stop - start) if piece.dim() else piece

    def write_back(self) -> None:
        """Copy the stepped master into the live weight where they are not one tensor."""
        if self.master.dtype != self.local.dtype or not _share_storage(self.master, self.local):
            self.local.copy_(self.master)


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank stores of a tensor, without autograd."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with torch.no_grad():  # a DTensor's own `detach` is dispatched in Python
        return tensor.to_local().detach()


def master_copy(tensor: Tensor) -> Tensor:
    """fp32 for narrower types, else the tensor itself."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _share_storage(one: Tensor, other: Tensor) -> bool:
    """Asked of the storage itself: fake tensors have no address."""
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata
