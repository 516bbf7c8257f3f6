"""Dense feed-forward blocks: gated ones, and GPT-2's with its activation of eight operations."""

from __future__ import annotations

from meshwright.cost.program.parts import Result, enter, leave, linear, with_bias
from meshwright.cost.program.tape import Storage, Tape
from meshwright.cost.program.work import Work


def gated(tape: Tape, work: Work, x: Storage, width: float, inputs: float) -> Result:
    """act(x G) * (x U), times D. Kept: x, both products, the activated gate, and their product."""
    size = work.element * work.tokens * width
    entered, due, out_of = enter(tape, work, x, inputs)
    gate, of_gate = linear(tape, work, entered, work.tokens, inputs, width, due=due)
    active, saved_gate = tape.new(size), tape.save(gate)
    tape.drop(gate)
    up, of_up = linear(tape, work, entered, work.tokens, inputs, width, due=due)
    product = tape.new(size)
    saved = (tape.save(active), tape.save(up))
    tape.drop(active, up)
    down, of_down = linear(tape, work, product, work.tokens, width, inputs)
    out, back_in = leave(tape, work, down, inputs)
    tape.drop(product, entered)

    def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
        of_product = of_down(back_in(gradient))
        of_active, of_up_product = tape.new(size), tape.new(size)
        tape.drop(of_product, *saved)
        of_input = of_up(of_up_product)
        of_gate_product = tape.new(size)
        tape.drop(of_active, saved_gate)
        return out_of(of_gate(of_gate_product, of_input), accumulated)

    return out, backward


def tanh_gelu_in_steps(tape: Tape, work: Work, x: Storage, width: float, inputs: float) -> Result:
    """x W, then u/2 * (1 + tanh(c (u + k u^3))) operation by operation, times the second weight. Kept of the
    activation: u, u/2, the tanh, one plus it, and the product."""
    size = work.element * work.tokens * width
    entered, due, out_of = enter(tape, work, x, inputs)
    u, of_u = linear(tape, work, entered, work.tokens, inputs, width, due=due)
    saved_u = tape.save(u)
    half = tape.new(size)
    power = tape.new(size)
    scaled = tape.new(size)
    tape.drop(power)
    inner = tape.new(size)
    tape.drop(scaled)
    argument = tape.new(size)
    tape.drop(inner)
    tanh = tape.new(size)
    tape.drop(argument)
    plus = tape.new(size)
    saved_tanh = tape.save(tanh)
    tape.drop(tanh)
    product = tape.new(size)
    saved = (tape.save(half), tape.save(plus))
    tape.drop(half, plus, u)
    down, of_down = linear(tape, work, product, work.tokens, width, inputs)
    out, back_in = leave(tape, work, down, inputs)
    out = with_bias(tape, out)
    tape.drop(product, entered)

    def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
        of_product = of_down(back_in(gradient))
        of_plus, of_half = tape.new(size), tape.new(size)
        tape.drop(of_product, *saved)
        of_argument = tape.new(size)
        tape.drop(of_plus, saved_tanh)
        of_inner = tape.new(size)
        tape.drop(of_argument)
        cubed, squares, factor, of_power = (tape.new(size) for _ in range(4))
        tape.drop(factor, squares, cubed, saved_u)
        of_u_product = tape.add(of_inner, of_power)
        of_first = tape.new(size)
        tape.drop(of_half)
        return out_of(of_u(tape.add(of_u_product, of_first)), accumulated)

    return out, backward
