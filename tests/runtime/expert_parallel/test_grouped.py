"""The grouped product equals one product per expert, forward and backward, whole and split."""

from __future__ import annotations

import pytest
import torch

from meshwright.runtime.expert_parallel.grouped import grouped_linear
from meshwright.runtime.split_backward import SplitBackward


@pytest.mark.parametrize("counts", [(3, 0, 4), (2, 2, 2), (0, 0, 0)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("later", [False, True])
def test_it_equals_one_product_per_expert(counts: tuple[int, ...], transposed: bool, later: bool):
    torch.manual_seed(0)
    rows = torch.randn(sum(counts), 5, dtype=torch.float64, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(3, *((5, 4) if transposed else (4, 5)), dtype=torch.float64))
    upstream = torch.randn(sum(counts), 4, dtype=torch.float64)
    pieces = [piece @ (w if transposed else w.t()) for piece, w in zip(rows.split(list(counts)), weight, strict=True)]
    expected = torch.autograd.grad(torch.cat(pieces), (rows, weight), upstream)
    split = SplitBackward()
    with split.during(later):
        found = grouped_linear(rows, weight, counts, transposed, split)
        found.backward(upstream)
    torch.testing.assert_close(found, torch.cat(pieces))
    left_over = [gradient for left in split.collect() for _, gradient in left.gradients()]
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad, expected[0])
    assert (weight.grad is None) == later
    torch.testing.assert_close(left_over[0] if later else weight.grad, expected[1])
