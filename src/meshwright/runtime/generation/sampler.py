"""The next token of every sequence from logits split over tp: the largest, or drawn from the likely ones.

In: logits [b, vocabulary / tp] of this rank. Out: token ids [b], equal on all tp ranks. A draw depends on the seed, the
prompt's number and the token's number, never on the layout or on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.errors import InputError
from meshwright.runtime.collectives import all_gather_first_dim
from meshwright.runtime.process_groups import AxisGroup
from meshwright.runtime.slices import TensorSlice
from meshwright.runtime.weights import seed_of

LOGITS, LARGEST = "next-token logits", "largest logit and its token"


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0: greedy. `top_k` 0 and `top_p` 1: all tokens."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise InputError(f"temperature {self.temperature:g} is not between 0 and 100")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top-p {self.top_p:g} is not above 0 and at most 1")
        if self.top_k < 0:
            raise InputError(f"top-k {self.top_k} is below 0; 0 means all tokens")


def next_tokens(
    logits: Tensor, rows: TensorSlice, tp: AxisGroup, sampling: Sampling, prompts: Sequence[int], step: int
) -> Tensor:
    """Token ids [b]; `prompts` are the sequences' numbers in the job, `step` counts their new tokens from 0."""
    precise = logits.float() if logits.dtype != torch.float64 else logits
    if sampling.temperature == 0.0:
        return _largest(precise, rows, tp)
    whole = gather_vocabulary(precise, rows, tp)
    probabilities = likely(whole, sampling)
    draws = [_uniform(sampling.seed, prompt, step) for prompt in prompts]
    return drawn(probabilities, torch.tensor(draws, dtype=torch.float64, device=logits.device))


def _largest(logits: Tensor, rows: TensorSlice, tp: AxisGroup) -> Tensor:
    """Of each rank's largest logit the largest; the lowest token where several are equal. Two numbers per sequence."""
    value, column = logits.max(dim=-1)
    pair = torch.stack((value.double(), (column + rows.start).double()))
    pairs = all_gather_first_dim(pair.unsqueeze(0), tp, LARGEST)  # [tp, 2, b]
    best = pairs[:, 0].argmax(dim=0)
    return pairs[:, 1].gather(0, best.unsqueeze(0)).squeeze(0).long()


def gather_vocabulary(logits: Tensor, rows: TensorSlice, tp: AxisGroup) -> Tensor:
    """[b, vocabulary] on every tp rank, from rows that the last ranks may have fewer of."""
    vocabulary = rows.shape[0]
    widest = -(-vocabulary // tp.size)
    padded = torch.nn.functional.pad(logits, (0, widest - logits.shape[-1]))
    gathered = all_gather_first_dim(padded.t(), tp, LOGITS)  # ranks cut as torch.chunk cuts: all but the last are full
    return gathered.t()[:, :vocabulary]


def likely(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [b, vocabulary] in float64 after temperature, top-k, then top-p, as transformers applies them."""
    scaled = logits.double() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, index = scaled.sort(dim=-1)
        cumulative = ordered.softmax(dim=-1).cumsum(dim=-1)
        unlikely = cumulative <= 1.0 - sampling.top_p
        unlikely[:, -1] = False
        scaled = scaled.masked_fill(unlikely.scatter(-1, index, unlikely), -torch.inf)
    return scaled.softmax(dim=-1)


def drawn(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token [b] at which the cumulative probability passes `uniform` [b]."""
    cumulative = probabilities.cumsum(dim=-1)
    target = uniform.unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=probabilities.shape[-1] - 1)


def _uniform(seed: int, prompt: int, step: int) -> float:
    """A number in [0, 1) that only these three decide."""
    return seed_of("sample", seed, prompt, step) / 2**63
