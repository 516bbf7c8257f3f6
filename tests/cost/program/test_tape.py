"""A tape counts what is held, forward and backward."""

from __future__ import annotations

import pytest

from meshwright.cost.program.feed_forward import gated
from meshwright.cost.program.parts import enter, linear
from meshwright.cost.program.tape import Storage, Tape
from meshwright.cost.program.work import Work

WORK = Work(batch=1, seq=8, hidden=4, element=2.0)


def test_a_storage_lives_while_it_has_holders() -> None:
    tape = Tape()
    one = tape.new(10.0)
    tape.hold(one)
    tape.drop(one)
    assert (tape.live, tape.peak) == (10.0, 10.0)
    tape.drop(one)
    assert (tape.live, tape.peak) == (0.0, 10.0)


def test_a_view_keeps_its_base_alive() -> None:
    tape = Tape()
    base = tape.new(10.0)
    view = tape.view(base, 4.0)
    tape.drop(base)
    assert tape.live == 10.0
    tape.drop(view)
    assert tape.live == 0.0


def test_a_product_keeps_its_input_and_makes_both_gradients() -> None:
    tape = Tape()
    x = tape.new(2.0 * 8 * 4)
    y, backward = linear(tape, WORK, x, 8, 4, 6)
    tape.drop(x)
    assert tape.live == 2.0 * (8 * 4 + 8 * 6)  # the input is saved
    tape.peak = tape.live
    gradient = tape.new(y.nbytes)
    tape.drop(y)
    of_input = backward(gradient)
    # saved input, output's gradient (beside the output at first), weight's and input's gradient
    assert tape.peak == 2.0 * (8 * 4 + 8 * 6 + 4 * 6 + 8 * 4)
    assert tape.live == of_input.nbytes == 2.0 * 8 * 4


@pytest.mark.parametrize(("element", "weight"), [(2.0, 2.0 * 4 * 6), (4.0, 0.0)])
def test_a_product_summed_at_once_makes_a_weight_gradient_only_if_the_sum_is_more_precise(
    element: float, weight: float
) -> None:
    work = Work(batch=1, seq=8, hidden=4, element=element)
    tape = Tape(at_once=True)
    x = tape.new(element * 8 * 4)
    y, backward = linear(tape, work, x, 8, 4, 6)
    tape.drop(x)
    gradient = tape.new(y.nbytes)
    tape.drop(y)
    tape.peak = tape.live
    held = tape.live
    tape.drop(backward(gradient))
    assert tape.peak == held + max(weight, element * 8 * 4)  # the weight's has gone when the input's is made
    assert tape.live == 0.0


@pytest.mark.parametrize("split", [False, True])
def test_a_product_that_tp_does_not_cut_makes_its_weight_gradient_beside_its_inputs(split: bool) -> None:
    tape = Tape(at_once=True, split=split)
    work = Work(batch=1, seq=8, hidden=4, element=4.0)
    x = tape.new(4.0 * 8 * 4)
    y, backward = linear(tape, work, x, 8, 4, 6, whole=True)
    tape.drop(x)
    gradient = tape.new(y.nbytes)
    tape.drop(y)
    held = tape.peak = tape.live
    tape.drop(backward(gradient))
    assert tape.peak == held + 4.0 * (4 * 6 + 8 * 4)
    assert tape.live == 0.0
    assert not tape.left


def test_a_split_product_leaves_its_input_and_the_gradient_of_its_output() -> None:
    tape = Tape(split=True)
    x = tape.new(2.0 * 8 * 4)
    y, backward = linear(tape, WORK, x, 8, 4, 6)
    tape.drop(x, y)
    of_input = backward(tape.new(2.0 * 8 * 6))
    tape.drop(of_input)
    assert tape.live == 2.0 * (8 * 4 + 8 * 6)
    assert tape.left_weight_bytes == 2.0 * 4 * 6


def test_products_of_a_tensor_parallel_block_leave_their_weight_gradients_to_its_entering() -> None:
    work = Work(batch=1, seq=8, hidden=4, element=2.0, tp=2)
    tape = Tape(gathered=True)  # weight gradients stay
    x = tape.new(work.stream)
    entered, due, out_of = enter(tape, work, x, 4)
    products = [linear(tape, work, entered, 8, 4, 6, due=due) for _ in range(2)]
    tape.drop(x, entered, *[y for y, _ in products])
    total = None
    for _, backward in products:
        total = backward(tape.new(2.0 * 8 * 6), total)
    assert total is not None
    inputs, outputs, weight = 2.0 * 8 * 4, 2.0 * 8 * 6, 2.0 * 4 * 6
    assert tape.live == inputs + 2 * outputs + inputs  # what came in, both outputs' gradients, the input's
    assert not tape.unit_gradients
    tape.peak = tape.live
    total = out_of(total)
    # the first weight's gradient beside all of it; the second's when the first output's gradient has gone
    assert tape.peak == inputs + 2 * outputs + inputs + weight
    assert tape.live == total.nbytes + 2 * weight
    assert len(tape.unit_gradients) == 2


def test_nothing_is_left_of_a_block_after_its_backward_pass() -> None:
    tape = Tape()
    x = Storage(WORK.stream)
    out, backward = gated(tape, WORK, x, 12, 4)
    kept = tape.live - out.nbytes
    # both products, the activated gate and their product; the input is its caller's
    assert kept == 2.0 * 8 * 12 * 4
    gradient = tape.new(out.nbytes)
    tape.drop(out)
    tape.drop(backward(gradient))
    assert tape.live == 0.0


def test_a_checkpoint_saves_nothing_in_its_first_pass() -> None:
    tape = Tape()
    with tape.forgetting():
        out, _ = gated(tape, WORK, Storage(WORK.stream), 12, 4)
    assert tape.live == out.nbytes
    assert tape.saving


@pytest.mark.parametrize("batch", [1, 2])
def test_a_gathered_sequence_is_copied_where_there_are_several(batch: int) -> None:
    """[b, s/t, h] of t ranks lies rank by rank: with one sequence that is its order already."""
    work = Work(batch=batch, seq=8, hidden=4, element=2.0, tp=2, sequence_parallel=True)
    tape = Tape()
    out, _ = gated(tape, work, Storage(work.stream), 12, 4)
    tape.drop(out)
    whole = 2.0 * work.tokens * 4
    assert tape.live == whole + 2.0 * work.tokens * 12 * 4
    first = Tape()
    enter(first, work, Storage(work.stream), 4)
    assert first.peak == whole * batch
