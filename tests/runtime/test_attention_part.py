"""Parts of attention are those of the whole: fused kernels as products, parts merged as one call of torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from meshwright.runtime.attention_part import FusedOnCpu, FusedOnCuda, Merged, Pairs, Products, Whole

SCALING = 0.3
PAIRS = {
    "all": Pairs(),
    "diagonal": Pairs(causal=True),
    "window": Pairs(allowed=torch.ones(24, 24, dtype=torch.bool).tril().triu(-5)),
    "queries without a key": Pairs(allowed=torch.ones(24, 24, dtype=torch.bool).tril(-8)),
}


def heads(count: int, tokens: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[2, count, tokens, width] as transformers lays it out: token after token."""
    return torch.randn(2, tokens, count, width, dtype=dtype).transpose(1, 2)


@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize(("kv_heads", "value_width"), [(4, 16), (2, 16), (4, 8), (1, 24)])
def test_the_fused_kernel_computes_what_products_do(pairs: Pairs, kv_heads: int, value_width: int) -> None:
    torch.manual_seed(0)
    q, k, v = heads(4, 24, 16), heads(kv_heads, 24, 16), heads(kv_heads, 24, value_width)
    fused, products = (kernel.forward(q, k, v, pairs, SCALING) for kernel in (FusedOnCpu(), Products()))
    torch.testing.assert_close(fused, products)
    # of a whole that has other keys too
    whole = Whole(heads(4, 24, value_width), products[1].logaddexp(torch.randn(2, 4, 24).double()))
    grad = heads(4, 24, value_width)
    fused_grads, grads = (
        kernel.backward(grad, whole, q, k, v, pairs, SCALING) for kernel in (FusedOnCpu(), Products())
    )
    torch.testing.assert_close(fused_grads, grads)


@given(cut=st.integers(1, 31), seed=st.integers(0, 2**16), narrow=st.booleans())
@settings(max_examples=40, deadline=None)
def test_parts_merged_are_the_whole(cut: int, seed: int, narrow: bool) -> None:
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if narrow else torch.float64
    q, k, v = (heads(2, 32, 8, dtype) for _ in range(3))
    kernel = FusedOnCpu()
    merged = Merged(*kernel.forward(q, k[:, :, :cut], v[:, :, :cut], Pairs(), SCALING))
    merged.add(slice(None), *kernel.forward(q, k[:, :, cut:], v[:, :, cut:], Pairs(), SCALING))
    q, k, v = (x.double() for x in (q, k, v))
    whole = functional.scaled_dot_product_attention(q, k, v, scale=SCALING)
    tolerance = 2**-7 if narrow else 1e-12
    torch.testing.assert_close(merged.output.double(), whole, rtol=0.0, atol=tolerance)
    torch.testing.assert_close(merged.log_sum.double(), (q @ k.mT * SCALING).logsumexp(-1), rtol=0.0, atol=tolerance)


@pytest.mark.parametrize(("kv_heads", "value_width"), [(4, 64), (2, 64), (4, 40)])
def test_the_cuda_kernel_is_called_as_torch_declares_it(kv_heads: int, value_width: int) -> None:
    """No GPU here: shapes alone, by torch's own description of the kernel."""
    q = torch.empty(2, 4, 128, 64, dtype=torch.bfloat16, device="meta")
    k = torch.empty(2, kv_heads, 256, 64, dtype=torch.bfloat16, device="meta")
    v = torch.empty(2, kv_heads, 256, value_width, dtype=torch.bfloat16, device="meta")
    out, log_sum = FusedOnCuda().forward(q, k, v, Pairs(causal=True), SCALING)
    grads = FusedOnCuda().backward(out, Whole(out, log_sum), q, k, v, Pairs(causal=True), SCALING)
    assert out.shape == (2, 4, 128, value_width)
    assert log_sum.shape == (2, 4, 128)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
