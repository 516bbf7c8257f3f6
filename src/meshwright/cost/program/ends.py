"""The ends of the model: embedding, final norm, head and loss."""

from __future__ import annotations

from meshwright.cost.program.parts import Norm, Result, enter, leave, linear
from meshwright.cost.program.tape import Storage, Tape
from meshwright.cost.program.work import FP32, INDEX, Work


def embedding(tape: Tape, work: Work, vocab: float, *, positions: float, scaled: bool) -> Result:
    """Tokens of the rank's rows of the vocabulary, masked where they lie elsewhere, summed over tp; `positions`: rows
    of a table of position embeddings. Backward: a gradient of the whole table, added to a tied head's."""
    h, e = work.hidden, work.element
    whole = e * work.tokens * h
    out = tape.new(whole)
    indices = None
    if work.tp > 1:
        indices = tape.new((INDEX + 1) * work.tokens)
        masked = tape.new(whole)
        tape.drop(out)
        out = masked
    out, back_in = leave(tape, work, out, h)
    if positions:
        of_positions, added = tape.new(out.nbytes / work.batch), tape.new(out.nbytes)
        tape.drop(out, of_positions)
        out = added
    if scaled:
        times = tape.new(out.nbytes)
        tape.drop(out)
        out = times

    def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
        if scaled:
            unscaled = tape.new(gradient.nbytes)
            tape.drop(gradient)
            gradient = unscaled
        if positions:
            tape.passing(e * positions * h)
        gradient = back_in(gradient)
        if work.tp > 1:
            own = tape.new(whole)
            tape.drop(gradient)
            gradient = own
        table = tape.new(e * vocab * h)
        tape.drop(gradient, indices)
        table = tape.add(table, tape.head_gradient)
        tape.weight_gradient(table)
        return table

    return out, backward


def loss(tape: Tape, work: Work, x: Storage, vocab: float, norm: Norm, *, tied: bool) -> Result:
    """Final norm, head and cross entropy. Over whole logits torch's own keeps their log-softmax; over a split
    vocabulary the softmax is made in the place of the logits in fp32, and the gradient in the softmax's. `tied`: the
    embedding is on this stage too, and the head's weight gradient waits for its own."""
    h, e, tokens = work.hidden, work.element, work.tokens
    normed, of_norm = norm(tape, work, x, work.rows, h)
    entered, due, out_of = enter(tape, work, normed, h)
    logits, of_head = linear(tape, work, entered, tokens, h, vocab, due=due, shared=tied)
    tape.drop(entered, normed)
    wide = FP32 * tokens * vocab
    precise = tape.new(wide) if work.narrow else tape.hold(logits)
    in_place = work.tp > 1 and work.narrow
    kept = tape.hold(precise) if in_place else tape.new(wide)
    tape.drop(precise, logits)

    def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
        tape.drop(gradient)
        of_logits = kept
        if work.tp == 1:
            of_loss, of_logits = tape.new(wide), tape.new(wide)
            tape.drop(of_loss, kept)
        if work.narrow:
            cast = tape.new(e * tokens * vocab)
            tape.drop(of_logits)
            of_logits = cast
        return of_norm(out_of(of_head(of_logits)), accumulated)

    return tape.new(FP32), backward
