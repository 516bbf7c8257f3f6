"""Attention blocks: projections, rotary embedding, core and output product, as transformers' modules run them."""

from __future__ import annotations

from meshwright.cost.program.core import Core, Heads
from meshwright.cost.program.parts import Norm, Result, enter, leave, linear, with_bias
from meshwright.cost.program.tape import Backward, Storage, Tape
from meshwright.cost.program.work import Work


def separate(
    tape: Tape, work: Work, x: Storage, heads: Heads, core: Core, head_norm: Norm | None, norms_last: bool
) -> Result:
    """Query, key and value each by a product of its own, rotated (Llama and its kin). `head_norm`: of single heads,
    straight after each projection, or after all three (`norms_last`, Gemma)."""
    h, tokens = work.hidden, work.tokens
    entered, due, out_of = enter(tape, work, x, h)
    widths = [heads.queries * heads.qk, heads.keys * heads.qk]
    projected: list[Storage] = []
    products: list[Backward] = []
    norms: list[Backward] = []

    def normed(at: int) -> None:
        assert head_norm is not None
        rows = tokens * widths[at] / heads.qk
        out, backward = head_norm(tape, work, projected[at], rows, heads.qk)
        tape.drop(projected[at])
        projected[at] = out
        norms.append(backward)

    for at, width in enumerate(widths):
        out, backward = linear(tape, work, entered, tokens, h, width, due=due)
        projected.append(out)
        products.append(backward)
        if head_norm and not norms_last:
            normed(at)
    v, of_v = linear(tape, work, entered, tokens, h, heads.keys * heads.v, due=due)
    if head_norm and norms_last:
        for at in range(2):
            normed(at)
    q, k = (rotate(tape, size * tokens * work.element) for size in widths)
    tape.drop(*projected)
    mixed, core_backward = core(tape, work, heads, q, k, v)
    out, of_mixed = linear(tape, work, mixed, tokens, heads.queries * heads.v, h)
    tape.drop(mixed)
    out, back_in = leave(tape, work, out, h)
    tape.drop(q, k, v, entered)

    def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
        of_q, of_k, of_values = core_backward(of_mixed(back_in(gradient)))
        of_k = rotate_back(tape, of_k)
        of_q = rotate_back(tape, of_q)
        if head_norm and norms_last:
            of_k = norms[1](of_k)
            of_q = norms[0](of_q)
        total = of_v(of_values)
        if head_norm and not norms_last:
            of_k = norms[1](of_k)
        total = products[1](laid_out(tape, of_k), total)
        if head_norm and not norms_last:
            of_q = norms[0](of_q)
        total = products[0](laid_out(tape, of_q), total)
        return out_of(total, accumulated)

    return out, backward


def fused(tape: Tape, work: Work, x: Storage, heads: Heads, core: Core) -> Result:
    """GPT-2: q, k and v side by side without rotation; their heads are views of one tensor."""
    h, tokens, e = work.hidden, work.tokens, work.element
    width = heads.queries * heads.qk
    entered, due, out_of = enter(tape, work, x, h)
    parts = [linear(tape, work, entered, tokens, h, width, due=due) for _ in range(3)]
    together = tape.new(3 * e * tokens * width)
    tape.drop(*[part for part, _ in parts])
    q, k, v = (tape.view(together, e * tokens * width) for _ in range(3))
    mixed, core_backward = core(tape, work, heads, q, k, v)
    out, of_mixed = linear(tape, work, mixed, tokens, width, h)
    tape.drop(mixed)
    out, back_in = leave(tape, work, out, h)
    out = with_bias(tape, out)
    tape.drop(q, k, v, together, entered)

    def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
        gradients = core_backward(of_mixed(back_in(gradient)))
        beside = tape.new(3 * e * tokens * width)
        tape.drop(*gradients)
        total: Storage | None = None
        for _, part in reversed(parts):
            total = part(tape.view(beside, e * tokens * width), total)
        tape.drop(beside)
        assert total is not None
        return out_of(total, accumulated)

    return out, backward


def rotate(tape: Tape, nbytes: float) -> Storage:
    """x cos + (-x2, x1) sin: autograd keeps the two tables alone."""
    first = tape.new(nbytes)
    negative = tape.new(nbytes / 2)
    turned = tape.new(nbytes)
    tape.drop(negative)
    second = tape.new(nbytes)
    tape.drop(turned)
    out = tape.new(nbytes)
    tape.drop(first, second)
    return out


def rotate_back(tape: Tape, gradient: Storage) -> Storage:
    nbytes = gradient.nbytes
    product = tape.new(nbytes)
    negative = tape.new(nbytes / 2)
    one = tape.new(nbytes)
    tape.drop(negative)
    other = tape.new(nbytes)
    tape.drop(product)
    turned = tape.new(nbytes)
    tape.drop(one, other)
    direct = tape.new(nbytes)
    tape.drop(gradient)
    out = tape.new(nbytes)
    tape.drop(turned, direct)
    return out


def laid_out(tape: Tape, gradient: Storage) -> Storage:
    """[b, heads, s, d] as [b, s, heads, d]: a copy."""
    copy = tape.new(gradient.nbytes)
    tape.drop(gradient)
    return copy
