"""Ring attention on one rank: keys and values travel, queries stay, each part is one call of a fused kernel.

Kept for backward: queries, keys and values side by side, the output and the logarithm of the sums. Two parts of a pass
are walked through: the rank's own keys, and the larger of what another rank's keys make (all queries, half the keys).
Masks of sliding windows, which the runtime makes one after the other, are left out.
"""

from __future__ import annotations

from meshwright.cost.program.core import CoreBackward, Gradients, Heads
from meshwright.cost.program.tape import Storage, Tape
from meshwright.cost.program.work import FP32, Work


def ring(tape: Tape, work: Work, heads: Heads, q: Storage, k: Storage, v: Storage) -> tuple[Storage, CoreBackward]:
    """One pass around the ring."""
    e, tokens, width = work.element, work.tokens, max(heads.qk, heads.v)
    per_query = FP32 * tokens * heads.queries
    kept = tape.new(e * tokens * heads.keys * (heads.qk + heads.v))
    arriving = tape.new(kept.nbytes)
    own = tape.new(e * tokens * heads.queries * width)
    log_sum = tape.new(per_query)
    merged = tape.new(per_query * heads.v) if work.narrow else tape.hold(own)
    sent_on = tape.new(kept.nbytes) if work.cp > 2 else None  # what came, beside what comes next
    other, other_log = tape.new(own.nbytes), tape.new(per_query)
    tape.drop(own)
    difference, share = tape.new(per_query), tape.new(per_query)
    tape.drop(difference)
    tape.passing(*[per_query * heads.v] * work.narrow)
    tape.passing(per_query)
    tape.drop(other, other_log, share, arriving, sent_on)
    out = tape.new(e * tokens * heads.queries * heads.v) if work.narrow else tape.hold(merged)
    saved = [tape.save(x) for x in (q, kept, out, log_sum)]
    tape.drop(kept, merged, log_sum)
    if width > heads.v and not work.narrow:  # the output is some columns of what the kernel gave
        columns = tape.new(e * tokens * heads.queries * heads.v)
        tape.drop(out)
        out = columns

    def backward(gradient: Storage) -> Gradients:
        return _backward(tape, work, heads, gradient, saved)

    return out, backward


def _backward(tape: Tape, work: Work, heads: Heads, gradient: Storage, saved: list[Storage | None]) -> Gradients:
    e, tokens = work.element, work.tokens
    pair = tokens * heads.keys * (heads.qk + heads.v)
    of_q = tape.new(FP32 * tokens * heads.queries * heads.qk)
    arriving = tape.new(e * pair)
    of_pair = tape.new(FP32 * pair)
    part = _part_gradients(tape, work, heads, None, keys=tokens)
    sent, received = _hop(tape, work, of_pair, pair)
    sent_on = tape.new(e * pair) if work.cp > 2 else None
    following = tape.new(FP32 * pair)  # a rank's own part, to which what was received is added
    tape.drop(of_pair)
    part = _part_gradients(tape, work, heads, part, keys=tokens / 2)
    last_sent, home = _hop(tape, work, following, pair)
    tape.drop(*part, sent, received, sent_on, arriving)
    whole_q = tape.new(e * tokens * heads.queries * heads.qk) if work.narrow else tape.hold(of_q)
    tape.drop(last_sent, following)
    of_k, of_v = (tape.view(home, e * tokens * heads.keys * width) for width in (heads.qk, heads.v))
    tape.drop(home, of_q, gradient, *saved)
    return whole_q, of_k, of_v


def _part_gradients(tape: Tape, work: Work, heads: Heads, before: list[Storage] | None, keys: float) -> list[Storage]:
    """Of a part's queries, keys and values, and the latter two side by side; the part before lives on so far."""
    e, width = work.element, max(heads.qk, heads.v)
    of_q = tape.new(e * work.tokens * heads.queries * width)
    of_k, of_v = (tape.new(e * keys * heads.keys * width) for _ in range(2))
    tape.drop(*(before or []))
    tape.passing(e * keys * heads.keys * (heads.qk + heads.v))
    return [of_q, of_k, of_v]


def _hop(tape: Tape, work: Work, of_pair: Storage, pair: float) -> tuple[Storage, Storage]:
    """What is sent, in the format of the keys, and what comes in its place."""
    sent = tape.new(work.element * pair) if work.narrow else tape.hold(of_pair)
    return sent, tape.new(work.element * pair)
