"""Parts that every decoder is made of: norms, linear products, entering and leaving a tensor-parallel block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from meshwright.cost.program.tape import Backward, Storage, Tape
from meshwright.cost.program.work import FP32, Work

Result = tuple[Storage, Backward]
Norm = Callable[[Tape, Work, Storage, float, float], Result]
"""(tape, work, input, rows, width)"""


@dataclass(eq=False)
class Due:
    """Inputs, output gradients and bytes of weight gradients that a block's products have left to its entering."""

    left: list[tuple[Storage | None, Storage, float, bool]] = field(
        default_factory=list[tuple[Storage | None, Storage, float, bool]]
    )

    def gradients(self, tape: Tape, work: Work) -> list[tuple[Storage, bool]]:
        """Made one by one, what each was made of goes; those that are not summed at once are there at the end.
        (`shared` of each.)"""
        made: list[tuple[Storage, bool]] = []
        for x, gradient, nbytes, shared in self.left:
            of_weight = _made(tape, work, nbytes, at_once=not shared)
            if of_weight is not None:
                made.append((of_weight, shared))
            tape.drop(x, gradient)
        self.left.clear()
        return made


def linear(
    tape: Tape,
    work: Work,
    x: Storage,
    rows: float,
    inputs: float,
    outputs: float,
    *,
    due: Due | None = None,
    shared: bool = False,
    whole: bool = False,
) -> Result:
    """y = x W: x is kept. Backward makes the weight's gradient (or sums it at once), then the input's. `due`: the
    weight's is left to the entering of the block. `shared`: the weight has another use, whose gradient comes later.
    `whole`: the model's own product, which tp does not cut: autograd delivers its gradients, in split passes too."""
    y = tape.new(work.element * rows * outputs)
    kept, split = tape.save(x), tape.split and not whole

    def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
        weight = work.element * inputs * outputs
        if split:
            of_input = tape.new(work.element * rows * inputs)
            tape.leave(x, gradient, _summed(work, weight) if tape.at_once else weight)
            tape.drop(gradient, kept)
            return tape.add(of_input, accumulated)
        if due is not None:
            of_input = tape.new(work.element * rows * inputs)
            due.left.append((kept, gradient, weight, shared))
            return tape.add(of_input, accumulated)
        of_weight = _made(tape, work, weight, at_once=not (shared or whole))
        of_input = tape.new(work.element * rows * inputs)
        tape.drop(gradient, kept)
        total = tape.add(of_input, accumulated)
        if of_weight is not None:
            _complete(tape, of_weight, shared)
        return total

    return y, backward


def _made(tape: Tape, work: Work, weight_bytes: float, at_once: bool) -> Storage | None:
    """A weight's gradient; None if it goes into the accumulated one as it is made."""
    if tape.at_once and at_once:
        tape.passing(_summed(work, weight_bytes))
        return None
    return tape.new(weight_bytes)


def _summed(work: Work, weight_bytes: float) -> float:
    """Bytes of a weight's gradient on its way to the accumulated one: none where the product adds to that itself."""
    return weight_bytes if work.narrow else 0.0


def _complete(tape: Tape, of_weight: Storage, shared: bool) -> None:
    if shared:
        tape.head_gradient = of_weight
    else:
        tape.weight_gradient(of_weight)


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


def enter(tape: Tape, work: Work, x: Storage, width: float) -> tuple[Storage, Due | None, Backward]:
    """Into a block: the sequence is gathered (held with the shard until the block returns), or nothing happens.
    Backward, the weight gradients that are due are made while the input's is summed over tp."""
    due = Due() if work.tp > 1 and not tape.split else None
    entered = _gather(tape, work, width) if work.scattered else tape.hold(x)

    def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
        total, sent = (_scattered(tape, work, width), gradient) if work.scattered else (gradient, None)
        laid_out = tape.new(gradient.nbytes) if work.scattered and work.batch > 1 else None  # rank by rank
        made = due.gradients(tape, work) if due else []
        tape.drop(sent, laid_out)
        total = tape.add(total, accumulated)
        for of_weight, shared in made:
            _complete(tape, of_weight, shared)
        return total

    return entered, due, backward


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
    scattered = _scattered(tape, work, width)
    if work.batch > 1:
        tape.passing(work.element * work.tokens * width)  # laid out rank by rank
    tape.drop(partial)
    return scattered


def _scattered(tape: Tape, work: Work, width: float) -> Storage:
    return tape.new(work.element * work.rows * width)


def with_bias(tape: Tape, out: Storage) -> Storage:
    """The bias of a row-parallel product is added after the sum, to a new tensor."""
    return _replaced(tape, out, out.nbytes)
