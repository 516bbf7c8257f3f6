"""Attention of some queries over some keys, with the logarithm of each query's sum of exponentials, so that parts of a
whole can be merged; and its gradients, given the output and the logarithm of the whole.

In: queries [b, heads, n, d], keys and values [b, kv heads, m, d] and which pairs count. One fused kernel of torch where
it has one for the device, the format and the mask; elsewhere (masks of windows on a GPU, fp32 on a GPU, other devices)
products and exponentials in fp32. The gradients are those of FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithm
2): they need of the other parts nothing but the whole's output and logarithm. Run so far: the kernel on CPUs, and the
products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional

from meshwright.runtime.tensor_parallel.cross_entropy import at_least_fp32

HALVES = (torch.float16, torch.bfloat16)
FLASH_WIDTH_UNIT = 8
"""CUDA's flash kernel takes heads whose width is a multiple of this."""

PartGradients = tuple[Tensor, Tensor, Tensor]
"""Of queries, keys and values."""


@dataclass(frozen=True)
class Pairs:
    """Which pairs of a part count: all, those of a diagonal (key no later than the query), or `allowed` [n, m]."""

    causal: bool = False
    allowed: Tensor | None = None


class PartKernel(Protocol):
    """One way to compute a part. Queries that see no key of it get the logarithm -inf and the output 0."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scaling: float) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, grad: Tensor, whole: Whole, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scaling: float
    ) -> PartGradients: ...


@dataclass(frozen=True)
class Whole:
    """Of the queries of a part: output [b, heads, n, d] and logarithm [b, heads, n] over all keys."""

    output: Tensor
    log_total: Tensor


class Merged:
    """Output and logarithm over the keys seen so far, in fp32 or better. The first part has all queries, and each of
    them sees a key of it."""

    def __init__(self, output: Tensor, log_sum: Tensor) -> None:
        self.output, self.log_sum = at_least_fp32(output), log_sum

    def add(self, rows: slice, output: Tensor, log_sum: Tensor) -> None:
        """Weigh both by their sums of exponentials: the new part's share is 1 / (1 + exp(log_sum so far - its own))."""
        so_far = self.log_sum[:, :, rows]
        share = torch.sigmoid(log_sum - so_far).unsqueeze(-1)
        self.output[:, :, rows].lerp_(at_least_fp32(output), share)
        self.log_sum[:, :, rows] = torch.logaddexp(so_far, log_sum)


def kernel_for(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs) -> PartKernel:
    """The fused kernel where there is one."""
    if q.device.type == "cpu":
        return FusedOnCpu()
    if q.device.type == "cuda" and q.dtype in HALVES and pairs.allowed is None:
        width = _width(q, v, FLASH_WIDTH_UNIT)
        query, key, value = (_padded(x, width) for x in (q, k, v))
        params = SDPAParams(query, key, value, None, 0.0, pairs.causal, q.shape[1] != k.shape[1])
        if can_use_flash_attention(params):
            return FusedOnCuda()
    return Products()


class FusedOnCpu:
    """torch's flash attention for CPUs: fp64 to bf16, any mask, fewer heads of keys than of queries."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scaling: float) -> tuple[Tensor, Tensor]:
        width = _width(q, v)
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_padded(x, width) for x in (q, k, v)),
            0.0,
            pairs.causal,
            attn_mask=_as_bias(pairs, q.dtype),
            scale=scaling,
        )
        if pairs.allowed is not None:  # the kernel says 0 where nothing is allowed
            log_sum = log_sum.masked_fill(~pairs.allowed.any(dim=-1), float("-inf"))
        return out[..., : v.shape[-1]], log_sum

    def backward(
        self, grad: Tensor, whole: Whole, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scaling: float
    ) -> PartGradients:
        width = _width(q, v)
        of_q, of_k, of_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_padded(x, width) for x in (grad, q, k, v, whole.output)),
            whole.log_total,
            0.0,
            pairs.causal,
            attn_mask=_as_bias(pairs, q.dtype),
            scale=scaling,
        )
        return of_q[..., : q.shape[-1]], of_k[..., : k.shape[-1]], of_v[..., : v.shape[-1]]


class FusedOnCuda:
    """FlashAttention-2 as torch carries it: fp16 and bf16, all pairs or a diagonal."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scaling: float) -> tuple[Tensor, Tensor]:
        width = _width(q, v, FLASH_WIDTH_UNIT)
        found: Any = torch.ops.aten._scaled_dot_product_flash_attention(
            *(_padded(x, width) for x in (q, k, v)), 0.0, pairs.causal, scale=scaling
        )
        return found[0][..., : v.shape[-1]], found[1]

    def backward(
        self, grad: Tensor, whole: Whole, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scaling: float
    ) -> PartGradients:
        width = _width(q, v, FLASH_WIDTH_UNIT)
        no_random = torch.empty(0, dtype=torch.uint64, device=q.device)  # states of a dropout that there is not
        of_q, of_k, of_v = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *(_padded(x, width) for x in (grad, q, k, v, whole.output)),
            whole.log_total.contiguous(),  # the kernel reads it row after row, whatever its strides say
            None,  # sequences of one length: no table of where each begins
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            pairs.causal,
            no_random,
            no_random,
            scale=scaling,
        )
        return of_q[..., : q.shape[-1]], of_k[..., : k.shape[-1]], of_v[..., : v.shape[-1]]


class Products:
    """Scores [n, m] as a tensor: what every device can do."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scaling: float) -> tuple[Tensor, Tensor]:
        groups = q.shape[1] // k.shape[1]
        scores = _scores(q, _repeated(k, groups), pairs, scaling)
        log_sum = scores.logsumexp(dim=-1)
        weights = torch.exp(scores - log_sum.masked_fill(log_sum == float("-inf"), 0.0).unsqueeze(-1))
        return weights @ _repeated(v, groups), log_sum

    def backward(
        self, grad: Tensor, whole: Whole, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scaling: float
    ) -> PartGradients:
        groups = q.shape[1] // k.shape[1]
        keys, grad = _repeated(k, groups), at_least_fp32(grad)
        weights = torch.exp(_scores(q, keys, pairs, scaling) - whole.log_total.unsqueeze(-1))
        delta = (grad * whole.output).sum(dim=-1, keepdim=True)
        of_scores = weights * (grad @ _repeated(v, groups).transpose(-1, -2) - delta) * scaling
        of_k = of_scores.transpose(-1, -2) @ at_least_fp32(q)
        return of_scores @ keys, _summed(of_k, groups), _summed(weights.transpose(-1, -2) @ grad, groups)


def _width(q: Tensor, v: Tensor, unit: int = 1) -> int:
    """Width of heads that holds keys and values: fused kernels take one for both."""
    return -(-max(q.shape[-1], v.shape[-1]) // unit) * unit


def _padded(heads: Tensor, width: int) -> Tensor:
    """Zeros beside each head: they add nothing to a product."""
    return heads if heads.shape[-1] == width else functional.pad(heads, (0, width - heads.shape[-1]))


def _as_bias(pairs: Pairs, dtype: torch.dtype) -> Tensor | None:
    """The CPU's kernel takes masks as numbers to add, in the format of the queries."""
    if pairs.allowed is None:
        return None
    none = torch.zeros(pairs.allowed.shape, dtype=dtype, device=pairs.allowed.device)
    return none.masked_fill_(~pairs.allowed, float("-inf"))


def _scores(q: Tensor, keys: Tensor, pairs: Pairs, scaling: float) -> Tensor:
    """Masked logits [b, heads, n, m] in fp32 or better."""
    scores = at_least_fp32(q) @ keys.transpose(-1, -2) * scaling
    allowed = pairs.allowed
    if pairs.causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril_()
    return scores if allowed is None else scores.masked_fill_(~allowed.to(scores.device), float("-inf"))


def _repeated(heads: Tensor, times: int) -> Tensor:
    """In fp32 or better, for every head of queries."""
    heads = at_least_fp32(heads)
    return heads if times == 1 else heads.repeat_interleave(times, dim=1)


def _summed(heads: Tensor, times: int) -> Tensor:
    """The gradient of `_repeated`."""
    return heads if times == 1 else heads.unflatten(1, (-1, times)).sum(dim=2)
