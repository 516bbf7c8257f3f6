"""What one rank computes for one microbatch: sizes that every part of the program reads.

Symbols as in Korthikanti et al. 2022: b micro batch, s sequence, h hidden, t tensor-parallel size; c context-parallel
size.
"""

from __future__ import annotations

from dataclasses import dataclass

FP32 = 4.0
INDEX = 8.0
"""Bytes of an index (int64)."""


@dataclass(frozen=True)
class Work:
    """`element`: bytes of activations and gathered weights. `sequence_parallel`: tokens outside blocks are split over
    tp. `exchanged`: context parallelism by all-to-all."""

    batch: int
    seq: int
    hidden: int
    element: float
    tp: int = 1
    sequence_parallel: bool = False
    cp: int = 1
    exchanged: bool = False
    ep: int = 1
    expert_tp: int = 1

    @property
    def tokens(self) -> float:
        """b s / c: tokens that a block works on."""
        return self.batch * self.seq / self.cp

    @property
    def scattered(self) -> bool:
        return self.sequence_parallel and self.tp > 1

    @property
    def rows(self) -> float:
        """Tokens between blocks."""
        return self.tokens / self.tp if self.scattered else self.tokens

    @property
    def stream(self) -> float:
        """Bytes of hidden states between blocks."""
        return self.element * self.rows * self.hidden

    @property
    def narrow(self) -> bool:
        """Whether activations are narrower than fp32, so that norms and losses cast."""
        return self.element < FP32
