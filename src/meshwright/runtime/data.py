"""Training data: a token file read as sequences in an order that no layout changes.

In: a token file (tokens.py), the sequence length, a seed. Out: `TokenData.batch(i, n)`, the i-th to (i+n)-th sequences
of the run: windows of seq + 1 tokens, shuffled anew in every epoch. The position is one number, the sequences consumed;
step k of a global batch B reads sequences kB to (k+1)B - 1, of which each dp rank takes its run of B / dp.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meshwright.errors import InputError
from meshwright.runtime.tokens import read_description


class TokenData:
    """Sequences of a memory-mapped token file, in the order of a seeded shuffle per epoch."""

    def __init__(self, token_file: Path, seq: int, seed: int, vocab: int) -> None:
        description = read_description(token_file)
        if description.largest >= vocab:
            raise InputError(
                f"the data has token {description.largest}, but the model's vocabulary is {vocab}; "
                f"use the model's own tokenizer, or a vocabulary of at least {description.largest + 1}"
            )
        self.seq = seq
        self.seed = seed
        self.digest = description.digest
        self.sequences = (description.tokens - 1) // seq
        if self.sequences < 1:
            raise InputError(
                f"the data has {description.tokens} tokens, too few for one sequence of {seq} and the token after it"
            )
        self._tokens = np.memmap(token_file, dtype=description.dtype, mode="r", shape=(description.tokens,))
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Token ids and labels [count, seq] of the run's sequences first .. first + count - 1."""
        windows = np.stack([self._window(index) for index in range(first, first + count)])
        both = torch.from_numpy(windows)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    def _window(self, index: int) -> NDArray[np.int64]:
        epoch, position = divmod(index, self.sequences)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.sequences)
        start = int(self._order[position]) * self.seq
        return self._tokens[start : start + self.seq + 1].astype(np.int64)
