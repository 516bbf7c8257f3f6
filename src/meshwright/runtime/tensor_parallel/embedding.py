"""Token embedding with the vocabulary split over tp: each rank looks up its own rows, the sum over tp completes them.

A vocabulary that tp does not divide is cut as torch.chunk cuts: the last ranks hold fewer rows, and tokens outside a
rank's rows are masked. [b, s] -> [b, s, h], or [b, s/tp, h] under sequence parallelism.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright.runtime.slices import TensorSlice
from meshwright.runtime.tensor_parallel.linear import declare, local
from meshwright.runtime.tensor_parallel.region import TensorParallelRegion

EMBEDDING = "embedding output"


class VocabParallelEmbedding(nn.Module):
    """`padding_idx` as in nn.Embedding (its row gets no gradient); `scale` multiplies the output (Gemma)."""

    weight: Tensor

    def __init__(
        self,
        rows: TensorSlice,
        region: TensorParallelRegion,
        padding_idx: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.slices = {"weight": rows}
        self.region = region
        self.scale = scale
        owns_padding = padding_idx is not None and rows.start <= padding_idx < rows.stop
        self.padding_idx = padding_idx - rows.start if owns_padding and padding_idx is not None else None
        declare(self, self.slices)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.slices["weight"]
        weight = local(self.weight)
        if rows.stop - rows.start == rows.shape[0]:
            looked_up = functional.embedding(tokens, weight, self.padding_idx)
        else:
            elsewhere = (tokens < rows.start) | (tokens >= rows.stop)
            own = (tokens - rows.start).masked_fill(elsewhere, 0)
            looked_up = functional.embedding(own, weight, self.padding_idx).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        embedded = self.region.leave(looked_up, EMBEDDING)
        # the scale is rounded to fp32 as transformers' buffer is
        return embedded if self.scale is None else embedded * torch.tensor(self.scale, dtype=torch.float32).to(weight)
