"""Parts that every decoder is made of: norms, linear products, entering and leaving a tensor-parallel block."""

from __future__ import annotations

from collections.abc import Callable

from meshwright.cost.program.tape import Backward, Storage, Tape
from meshwright.cost.program.work import FP32, Work

Result = tuple[Storage, Backward]
Norm = Callable[[Tape, Work, Storage, float, float], Result]
"""(tape, work, input, rows, width)"""


def linear(
    tape: Tape, work: Work, x: Storage, rows: float, inputs: float, outputs: float, *, shared: bool = False
) -> Result:
    """y = x W: x is kept. Backward makes the weight's gradient, then the input's. `shared`: the weight has another use,
    whose gradient comes later."""
    y = tape.new(work.element * rows * outputs)
    kept, split = tape.save(x), tape.split

    def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
        weight = work.element * inputs * outputs
        if split:
            of_input = tape.new(work.element * rows * inputs)
            tape.leave(x, gradient, weight)
            tape.drop(gradient, kept)
            return tape.add(of_input, accumulated)
        of_weight, of_input = tape.new(weight), tape.new(work.element * rows * inputs)
        tape.drop(gradient, kept)
        total = tape.add(of_input, accumulated)
        if shared:
            tape.head_gradient = of_weight
        else:
            tape.weight_gradient(of_weight)
        return total

    return y, backward


def rms_norm(tape: Tape, work: Work, x: Storage, rows: float, width: float) -> Result:
    """Llama's: x in fp32, its inverse norm, the normalised values as the weight multiplies them."""
    return _rms_norm(tape, work, x, rows, width, weight_in_fp32=False)


def gemma_norm(tape: Tape, work: Work, x: Storage, rows: float, width: float) -> Result:
    """Gemma's: the weight multiplies in fp32, the cast comes last."""
    return _rms_norm(tape, work, x, rows, width, weight_in_fp32=True)


def _rms_norm(tape: Tape, work: Work, x: Storage, rows: float, width: float, *, weight_in_fp32: bool) -> Result:
    wide, narrow = FP32 * rows * width, work.element * rows * width
    precise = tape.new(wide) if work.narrow else tape.hold(x)
    tape.passing(wide)  # squares
    inverse = tape.new(FP32 * rows)
    normed = tape.new(wide)
    if weight_in_fp32:
        out = tape.new(wide)
        kept = (tape.save(precise), tape.save(inverse), tape.save(normed))
        if work.narrow:
            cast = tape.new(narrow)
            tape.drop(out)
            out = cast
    else:
        if work.narrow:
            cast = tape.new(narrow)
            kept = (tape.save(precise), tape.save(inverse), tape.save(cast))
            out = tape.new(narrow)
            tape.drop(cast)
        else:
            kept = (tape.save(precise), tape.save(inverse), tape.save(normed))
            out = tape.new(wide)
    tape.drop(precise, inverse, normed)

    def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
        if weight_in_fp32:
            if work.narrow:
                gradient = _replaced(tape, gradient, wide)
            of_weight, of_normed = tape.new(wide), tape.new(wide)
            tape.drop(of_weight, gradient, kept[2])
        else:
            of_normed, of_weight = tape.new(narrow), tape.new(narrow)
            tape.drop(of_weight, gradient, kept[2])
            if work.narrow:
                of_normed = _replaced(tape, of_normed, wide)
        of_inverse, direct = tape.new(wide), tape.new(wide)
        tape.drop(of_inverse, of_normed, kept[1])
        if not work.narrow:  # the input itself: gradients meet as they come
            direct, accumulated = tape.add(direct, accumulated), None
        mean, power, scaled, through = (tape.new(wide) for _ in range(4))
        tape.drop(mean, power, scaled, kept[0])
        total = tape.add(direct, through)
        if work.narrow:
            total = _replaced(tape, total, narrow)
        return tape.add(total, accumulated)

    return out, backward


def layer_norm(tape: Tape, work: Work, x: Storage, rows: float, width: float) -> Result:
    """One kernel: keeps its input, means and inverse deviations."""
    out, statistics = tape.new(work.element * rows * width), tape.new(2 * work.element * rows)
    kept = (tape.save(x), tape.save(statistics))
    tape.drop(statistics)

    def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
        of_input = tape.new(work.element * rows * width)
        tape.drop(gradient, *kept)
        return tape.add(of_input, accumulated)

    return out, backward


def _replaced(tape: Tape, storage: Storage, nbytes: float) -> Storage:
    """A copy in another type; the original goes."""
    copy = tape.new(nbytes)
    tape.drop(storage)
    return copy


def enter(tape: Tape, work: Work, x: Storage, width: float) -> Result:
    """Into a block: the sequence is gathered (held with the shard until the block returns), or nothing happens."""
    if not work.scattered:
        return tape.hold(x), _through(tape)
    gathered = _gather(tape, work, width)

    def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
        return tape.add(_scatter(tape, work, width, gradient), accumulated)

    return gathered, backward


def leave(tape: Tape, work: Work, partial: Storage, width: float) -> Result:
    """Out of a block: partial sums are scattered over the sequence, or reduced in place."""
    if not work.scattered:
        return partial, _through(tape)
    scattered = _scatter(tape, work, width, partial)

    def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
        gathered = _gather(tape, work, width)
        tape.drop(gradient)
        return tape.add(gathered, accumulated)

    return scattered, backward


def _through(tape: Tape) -> Backward:
    def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
        return tape.add(gradient, accumulated)

    return backward


def _gather(tape: Tape, work: Work, width: float) -> Storage:
    """[b, s/t, w] of all ranks, laid out as [b, s, w]: a copy where b > 1."""
    whole = work.element * work.tokens * width
    stacked = tape.new(whole)
    return stacked if work.batch == 1 else _replaced(tape, stacked, whole)


def _scatter(tape: Tape, work: Work, width: float, partial: Storage) -> Storage:
    scattered = tape.new(work.element * work.rows * width)
    if work.batch > 1:
        tape.passing(work.element * work.tokens * width)  # laid out rank by rank
    tape.drop(partial)
    return scattered


def with_bias(tape: Tape, out: Storage) -> Storage:
    """The bias of a row-parallel product is added after the sum, to a new tensor."""
    return _replaced(tape, out, out.nbytes)
