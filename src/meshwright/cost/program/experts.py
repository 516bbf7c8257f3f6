"""Routed experts over ep and expert_tp (`runtime.expert_parallel`), their router, and a shared expert beside them.

n tokens of this tp rank, k experts per token: n k copies travel, lie expert by expert, go through two grouped products
and come back to be weighed and summed in fp32. Routing is taken as balanced, as in the dry run.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.cost.program.feed_forward import gated
from meshwright.cost.program.parts import Result
from meshwright.cost.program.tape import Storage, Tape
from meshwright.cost.program.work import FP32, INDEX, Work


@dataclass(frozen=True)
class Mixture:
    """`width`: of one expert on a rank. `precise_router`: tokens are cast to fp32 for it (DeepSeek-V3). `router_kept`:
    bytes per token and expert that the choice keeps."""

    experts: int
    top_k: int
    width: float
    shared_width: float
    precise_router: bool
    router_kept: float


def mixture(tape: Tape, work: Work, x: Storage, moe: Mixture) -> Result:
    """Router, experts, shared expert. Without sequence parallelism each tp rank routes its own 1/t of the tokens."""
    h, e = work.hidden, work.element
    splits = work.tp > 1 and not work.scattered
    tokens = work.tokens / work.tp
    mine = tape.new(e * tokens * h) if splits else tape.hold(x)
    cast = tape.new(FP32 * tokens * h) if moe.precise_router and work.narrow else None
    choice = tape.new(tokens * moe.experts * moe.router_kept)
    saved_router = [tape.save(s) for s in ((cast or mine), choice)]
    tape.drop(cast)
    mixed, of_experts = _routed(tape, work, mine, tokens, moe)
    if splits:
        whole = tape.new(e * work.tokens * h)
        tape.drop(mixed)
        mixed = whole
    tape.drop(mine)
    of_shared = None
    if moe.shared_width:
        shared, of_shared = gated(tape, work, x, moe.shared_width, h)
        total = tape.new(mixed.nbytes)
        tape.drop(mixed, shared)
        mixed = total
    tape.drop(choice)

    def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
        if of_shared is not None:
            accumulated = of_shared(tape.hold(gradient), accumulated)
        of_mine = of_experts(gradient)
        of_router = tape.new((FP32 if moe.precise_router else e) * tokens * h)
        tape.drop(*saved_router)
        if moe.precise_router and work.narrow:
            narrow = tape.new(e * tokens * h)
            tape.drop(of_router)
            of_router = narrow
        of_mine = tape.add(of_router, of_mine)
        if splits:
            gathered = tape.new(e * work.tokens * h)
            tape.drop(of_mine)
            of_mine = gathered
        return tape.add(of_mine, accumulated)

    return mixed, backward


def _routed(tape: Tape, work: Work, mine: Storage, tokens: float, moe: Mixture) -> Result:
    h, e = work.hidden, work.element
    copies = tokens * moe.top_k
    rows = copies * work.expert_tp
    here = moe.experts / work.ep
    blocks = work.ep * work.expert_tp
    reordered = blocks > 1 and here > 1
    small, large = e * copies * h, e * rows * h
    inner = e * rows * moe.width
    unit, split = tape.experts, tape.split
    if unit:
        unit.gather()
    index = tape.new(INDEX * copies * (3 + 2 * work.expert_tp * reordered))
    saved_index = tape.save(index)

    travelling = _dispatch(tape, tape.new(small), work, large, reordered)
    widened = tape.new(2 * inner)
    saved_rows = tape.save(travelling)
    active = tape.new(inner)
    product = tape.new(inner)
    saved = [tape.save(s) for s in (widened, active)]
    tape.drop(active)
    out = tape.new(large)
    saved_product = tape.save(product)
    tape.drop(widened, product)
    out = _combine(tape, out, work, small, large, reordered)
    tape.drop(travelling)
    returned = tape.new(small)
    weighed = tape.new(FP32 * copies * h)
    summed = tape.new(FP32 * tokens * h)
    tape.drop(weighed)
    if work.narrow:
        cast = tape.new(e * tokens * h)
        tape.drop(summed)
        summed = cast
    saved_copies = tape.save(returned)
    tape.drop(out, returned, index)
    if unit:
        unit.release()

    def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
        if unit:
            unit.needed()
        if work.narrow:
            precise = tape.new(FP32 * tokens * h)
            tape.drop(gradient)
            gradient = precise
        of_weights, of_copies = (tape.new(FP32 * copies * h) for _ in range(2))
        if work.narrow:
            cast_copies = tape.new(small)
            tape.drop(of_copies)
            of_copies = cast_copies
        tape.drop(of_weights, gradient, saved_copies)
        of_out = _placed(tape, of_copies, small)
        of_out = _dispatch(tape, of_out, work, large, reordered, gradients=True)
        of_product = tape.new(inner)
        _weights(tape, product, of_out, e * here * h * moe.width, split)
        tape.drop(saved_product)
        of_active, of_up = tape.new(inner), tape.new(inner)
        tape.drop(of_product)
        of_gate = tape.new(inner)
        tape.drop(of_active, *saved)
        of_widened = tape.new(2 * inner)
        tape.drop(of_gate, of_up)
        of_rows = tape.new(large)
        _weights(tape, travelling, of_widened, e * here * h * 2 * moe.width, split)
        tape.drop(saved_rows)
        of_sent = _combine(tape, of_rows, work, small, large, reordered, gradients=True)
        of_tokens = _placed(tape, of_sent, e * tokens * h)
        tape.drop(saved_index)
        if unit:
            unit.reduce()
        return tape.add(of_tokens, accumulated)

    return summed, backward


def _weights(tape: Tape, inputs: Storage, gradient: Storage, nbytes: float, split: bool) -> None:
    """The gradient of stacked weights: made now, or what it needs left for later. The output's gradient goes."""
    if split:
        tape.leave(inputs, gradient, nbytes)
        tape.drop(gradient)
        return
    of_weights = tape.new(nbytes)
    tape.drop(gradient)
    tape.weight_gradient(of_weights)


def _placed(tape: Tape, rows: Storage, nbytes: float) -> Storage:
    """The gradient of picking rows: zeros, and a copy of them with the rows added."""
    zeros, placed = tape.new(nbytes), tape.new(nbytes)
    tape.drop(zeros, rows)
    return placed


def _dispatch(tape: Tape, rows: Storage, work: Work, large: float, reordered: bool, gradients: bool = False) -> Storage:
    """Copies to the ranks of their experts: an exchange over ep, a gather over expert_tp, then expert by expert.
    Forward, names hold every step until the last; backward each goes with the next. (Backward of combine runs the same
    way.)"""
    held: list[Storage] = []

    def step(nbytes: float) -> None:
        nonlocal rows
        following = tape.new(nbytes)
        if gradients:
            tape.drop(rows)
        else:
            held.append(rows)
        rows = following

    if work.ep > 1:
        step(rows.nbytes)
    if work.expert_tp > 1:
        step(large)
    if reordered and gradients:
        rows = _placed(tape, rows, large)
    elif reordered:
        step(large)
    tape.drop(*held)
    return rows


def _combine(
    tape: Tape, rows: Storage, work: Work, small: float, large: float, reordered: bool, gradients: bool = False
) -> Storage:
    """The way back."""
    if reordered and gradients:
        rows = _placed(tape, rows, large)
    elif reordered:
        rows = _next(tape, rows, large)
    if work.expert_tp > 1:
        rows = _next(tape, rows, small)
    return _next(tape, rows, small) if work.ep > 1 else rows


def _next(tape: Tape, rows: Storage, nbytes: float) -> Storage:
    following = tape.new(nbytes)
    tape.drop(rows)
    return following
