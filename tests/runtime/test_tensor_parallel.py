"""Tensor-parallel layers by themselves: each equals its plain counterpart, forward and backward."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig
from meshwright.ledger import Collective, Phase
from meshwright.runtime.collectives import all_to_all, gather_sequence_from_axis, reduce_scatter_sequence_to_axis
from meshwright.runtime.launch import Device, run_ranks
from meshwright.runtime.process_groups import AxisGroup, ProcessGroupManager, WorkOnAxis
from meshwright.runtime.tensor_parallel import (
    SequenceParallelAttention,
    cross_entropy_sum,
    vocab_parallel_cross_entropy,
)
from meshwright.runtime.weights import materialize

HIDDEN, HEADS, HEAD_DIM, SEQ = 16, 4, 4, 8


def tp_groups(size: int) -> ProcessGroupManager:
    return ProcessGroupManager(HybridParallelConfig(tp=size), Device("cpu", "gloo"))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def split_loss(vocab: int, tp: int) -> tuple[float, float]:
    """The loss and the largest error of its gradient."""
    axis = tp_groups(tp).axis("tp")
    logits = drawn(5, vocab)
    labels = torch.tensor([0, vocab - 1, -100, vocab // 2, 1])
    whole = logits.clone().requires_grad_()
    expected = cross_entropy_sum(whole, labels)
    expected.backward()
    rows = -(-vocab // tp)
    start, stop = axis.rank * rows, min((axis.rank + 1) * rows, vocab)
    part = logits[:, start:stop].clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(part, labels, start, axis)
    loss.backward()
    assert part.grad is not None
    assert whole.grad is not None
    return float(loss.detach() - expected.detach()), float((part.grad - whole.grad[:, start:stop]).abs().max())


@pytest.mark.parametrize(("vocab", "tp"), [(12, 2), (13, 4)])
def test_split_cross_entropy_equals_the_whole_one_without_gathering_logits(vocab: int, tp: int):
    for loss_error, gradient_error in run_ranks(tp, split_loss, vocab, tp):
        assert abs(loss_error) < 1e-12
        assert gradient_error < 1e-14


def attention_error(kv_heads: int, tp: int) -> list[float]:
    """Largest errors of output, input gradient and weight gradients against plain attention."""
    groups = tp_groups(tp)
    axis = groups.axis("tp")
    module = SequenceParallelAttention(HIDDEN, HEADS, kv_heads, HEAD_DIM, axis)
    shapes = {"q_proj": HEADS, "k_proj": kv_heads, "v_proj": kv_heads}
    weights = {f"{n}.weight": drawn(h * HEAD_DIM, HIDDEN, seed=i) for i, (n, h) in enumerate(shapes.items())}
    weights["o_proj.weight"] = drawn(HIDDEN, HEADS * HEAD_DIM, seed=9)
    slices = {f"{n}.weight": part.slices["weight"] for n, part in module.named_children()}  # type: ignore[index]

    class Source:
        def read(self, piece: Any) -> Tensor:
            return piece.of(weights[piece.name])

    materialize(module, slices, Source(), torch.float64, torch.device("cpu"), groups.mesh["tp"])
    whole_input = drawn(2, SEQ, HIDDEN, seed=5).requires_grad_()
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    expected = plain_attention(whole_input, leaves)
    upstream = drawn(*expected.shape, seed=6)
    expected.backward(upstream)

    own = slice(axis.rank * SEQ // tp, (axis.rank + 1) * SEQ // tp)
    shard = whole_input.detach()[:, own].clone().requires_grad_()
    output = module(shard)
    output.backward(upstream[:, own])
    assert shard.grad is not None
    assert whole_input.grad is not None
    errors = [output.detach() - expected.detach()[:, own], shard.grad - whole_input.grad[:, own]]
    copies = groups.split_axis("kv", "tp", max(1, tp // kv_heads))
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        grad = parameter.grad.to_local()  # type: ignore[attr-defined]
        if slices[name].copies > 1:
            dist.all_reduce(grad, group=copies.group)
        expected_grad = leaves[name].grad
        assert expected_grad is not None
        errors.append(grad - slices[name].of(expected_grad))
    return [float(error.abs().max()) for error in errors]


def plain_attention(hidden: Tensor, weights: dict[str, Tensor]) -> Tensor:
    q, k, v = (
        functional.linear(hidden, weights[f"{name}.weight"]).view(2, SEQ, -1, HEAD_DIM).transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return functional.linear(mixed.transpose(1, 2).flatten(2), weights["o_proj.weight"])


@pytest.mark.parametrize(("kv_heads", "tp"), [(4, 2), (1, 2)])
def test_sequence_parallel_attention_equals_plain_attention(kv_heads: int, tp: int):
    for errors in run_ranks(tp, attention_error, kv_heads, tp):
        assert max(errors) < 1e-12


class SeenProducts(TorchDispatchMode):
    """Writes down products with a result of this shape, and sums over an axis."""

    def __init__(self, shape: tuple[int, ...], order: list[str]) -> None:
        super().__init__()
        self._shape, self._order = shape, order

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and tuple(found.shape) == self._shape:
            self._order.append("weight gradient")
        if "reduce_scatter" in str(func):
            self._order.append("sum begins")
        return found


def order_of_backward() -> list[str]:
    """Of an attention block of three products of one shape."""
    groups = tp_groups(2)
    module = SequenceParallelAttention(HIDDEN, HEADS, HEADS, HEAD_DIM, groups.axis("tp"))
    for name, parameter in list(module.named_parameters()):
        owner = module.get_submodule(name.rpartition(".")[0])
        owner.register_parameter("weight", nn.Parameter(drawn(*parameter.shape)))
    output = module(drawn(2, SEQ // 2, HIDDEN).requires_grad_())
    order: list[str] = []

    def wait(_work: WorkOnAxis) -> bool:
        order.append("sum is waited for")
        return True

    local_shape = (HEADS * HEAD_DIM // 2, HIDDEN)  # of the output product it is the other way round
    with patch.object(WorkOnAxis, "wait", wait), SeenProducts(local_shape, order):
        output.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    return order


def test_weight_gradients_of_a_block_are_computed_between_the_sum_of_its_input_gradient_and_the_wait_for_it():
    for order in run_ranks(2, order_of_backward):
        assert order == ["sum begins", *["weight gradient"] * 3, "sum is waited for"]


def heads_that_do_not_divide() -> None:
    axis = tp_groups(3).axis("tp")
    with pytest.raises(InputError, match="tp=3 does not divide 4 attention heads"):
        SequenceParallelAttention(HIDDEN, HEADS, HEADS, HEAD_DIM, axis)
    with pytest.raises(InputError, match="neither divides 2 heads nor is a multiple"):
        SequenceParallelAttention(HIDDEN, 3, 2, HEAD_DIM, axis)


def test_heads_that_tp_does_not_divide_are_refused_in_words():
    run_ranks(3, heads_that_do_not_divide)


def sequence_pair(axis: AxisGroup) -> None:
    """Gather then scatter of the sum is `size` times the identity, and so is its gradient."""
    shard = drawn(2, 3, 4, seed=axis.rank).requires_grad_()
    back = reduce_scatter_sequence_to_axis(gather_sequence_from_axis(shard, axis, "x"), axis, "x")
    assert torch.allclose(back, axis.size * shard)
    back.sum().backward()
    assert shard.grad is not None
    assert torch.allclose(shard.grad, torch.full_like(shard, axis.size))


def uneven_exchange(axis: AxisGroup) -> None:
    """Rank r sends r + 1 rows to everyone; the gradient of what was sent comes back to where it came from."""
    sent = [axis.rank + 1] * axis.size
    received = [rank + 1 for rank in range(axis.size)]
    rows = torch.full((sum(sent), 2), float(axis.rank)).requires_grad_()
    got = all_to_all(rows, axis, "x", sent, received)
    assert got[:, 0].tolist() == [float(r) for r in range(axis.size) for _ in range(r + 1)]
    (got * (axis.rank + 1)).sum().backward()
    assert rows.grad is not None
    assert rows.grad[:, 0].tolist() == [float(r + 1) for r in range(axis.size) for _ in range(axis.rank + 1)]


def exercise_collectives() -> dict[tuple[Collective, Phase], tuple[int, int]]:
    groups = tp_groups(2)
    axis = groups.axis("tp")
    sequence_pair(axis)
    groups.recorder.reset()
    with groups.recorder.during(Phase.BACKWARD):
        uneven_exchange(axis)
    return {(e.collective, e.phase): (e.calls, e.total_bytes) for e in groups.recorder.traffic()}


def test_collective_pairs_run_their_gradients_the_other_way_and_record_what_they_move():
    for rank, recorded in enumerate(run_ranks(2, exercise_collectives)):
        own, others = 2 * (rank + 1) * 2 * 4, 3 * 2 * 4  # rows x 2 columns x fp32
        assert recorded == {(Collective.ALL_TO_ALL, Phase.BACKWARD): (2, own + others)}


def test_cross_entropy_ignores_labels_of_minus_100():
    logits = drawn(3, 7)
    labels = torch.tensor([1, -100, 2])
    expected = nn.CrossEntropyLoss(reduction="sum")(logits[[0, 2]], labels[[0, 2]])
    assert torch.isclose(cross_entropy_sum(logits, labels), expected)
