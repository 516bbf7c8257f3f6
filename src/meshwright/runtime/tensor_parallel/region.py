"""How activations enter and leave a tensor-parallel block, with or without sequence parallelism.

Outside a block activations are [b, s, h] replicated over tp, or [b, s/tp, h] sequence shards; inside they are
[b, s, h]. Entering is done once per block (`entering.hook`), not once per product.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed import Work

from meshwright.runtime.collectives import (
    all_reduce,
    begin_reduce_scatter_sequence,
    copy_to_axis,
    gather_sequence_from_axis,
    reduce_from_axis,
    reduce_scatter_sequence_to_axis,
)
from meshwright.runtime.process_groups import AxisGroup

LAYER_INPUT = "block input"
LAYER_OUTPUT = "block output"


@dataclass(frozen=True)
class TensorParallelRegion:
    """The tp axis and whether the sequence is sharded over it between blocks."""

    axis: AxisGroup
    sequence_parallel: bool = False

    def enter(self, tensor: Tensor, what: str = LAYER_INPUT) -> Tensor:
        """Forward: copy, or all-gather of the sequence. Backward: all-reduce, or reduce-scatter. Tokens [n, h] without
        a batch are one sequence: what is entered by token needs no other order."""
        if self.sequence_parallel:
            if tensor.dim() == 2:
                return gather_sequence_from_axis(tensor.unsqueeze(0), self.axis, what).squeeze(0)
            return gather_sequence_from_axis(tensor, self.axis, what)
        return copy_to_axis(tensor, self.axis, what)

    def begin_sum(self, gradient: Tensor, what: str) -> tuple[Tensor, Work | None]:
        """What `enter` does backward [b, s, h], and the work to wait for before its result is read."""
        if self.sequence_parallel:
            return begin_reduce_scatter_sequence(gradient, self.axis, what)
        whole = gradient.contiguous()
        return whole, all_reduce(whole, self.axis, what, async_op=True)

    def leave(self, partial: Tensor, what: str = LAYER_OUTPUT) -> Tensor:
        """Forward: all-reduce, or reduce-scatter of the sequence. Backward: identity, or all-gather."""
        if self.sequence_parallel:
            if partial.dim() == 2:
                return reduce_scatter_sequence_to_axis(partial.unsqueeze(0), self.axis, what).squeeze(0)
            return reduce_scatter_sequence_to_axis(partial, self.axis, what)
        return reduce_from_axis(partial, self.axis, what)

    def shard_length(self, seq: int) -> int:
        """Tokens of a sequence that this rank holds outside blocks."""
        return seq // self.axis.size if self.sequence_parallel else seq

    def own_tokens(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of a replicated tensor (a view)."""
        if not self.sequence_parallel or self.axis.size == 1:
            return tensor
        shard = tensor.shape[dim] // self.axis.size
        return tensor.narrow(dim, self.axis.rank * shard, shard)
