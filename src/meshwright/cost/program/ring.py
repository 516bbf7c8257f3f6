"""Ring attention on one rank: keys and values travel, queries stay, blocks of scores are worked on in fp32.

Kept for backward: queries, keys and values side by side, the output and the logarithm of the sums. Both passes hold
what travels and, per block of half the rank's tokens squared, the tensors named here; those of a block live on until
the next block has made its own.
"""

from __future__ import annotations

from meshwright.cost.program.core import CoreBackward, Gradients, Heads
from meshwright.cost.program.tape import Storage, Tape
from meshwright.cost.program.work import FP32, INDEX, Work

BLOCKS = 2
"""Blocks of a step of the ring that are walked through: the second is made beside the first."""


def ring(tape: Tape, work: Work, heads: Heads, q: Storage, k: Storage, v: Storage) -> tuple[Storage, CoreBackward]:
    """One pass around the ring; at least two blocks follow one another, so two are walked through."""
    e, tokens = work.element, work.tokens
    of_values = FP32 * tokens * heads.queries * heads.v
    kept = tape.new(e * tokens * heads.keys * (heads.qk + heads.v))
    precise = tape.new(FP32 * tokens * heads.queries * heads.qk) if work.narrow else tape.hold(q)
    largest, total = (tape.new(FP32 * tokens * heads.queries) for _ in range(2))
    mixed = tape.new(of_values)
    arriving = tape.new(kept.nbytes)
    block = _Block(tape, work, heads)
    for _ in range(BLOCKS):
        block.scores()
        block.weights()
        tape.passing(*[of_values / 2] * 3)
    block.close()
    tape.drop(arriving)
    wide = tape.new(of_values)
    out = tape.new(e * tokens * heads.queries * heads.v) if work.narrow else tape.hold(wide)
    tape.drop(wide)
    log_total = tape.new(FP32 * tokens * heads.queries)
    saved = [tape.save(x) for x in (q, kept, out, log_total)]
    tape.drop(kept, precise, largest, total, mixed, log_total)
    contiguous = tape.new(out.nbytes)  # [b, s/c, heads, d]
    tape.drop(out)

    def backward(gradient: Storage) -> Gradients:
        return _backward(tape, work, heads, gradient, saved)

    return contiguous, backward


def _backward(tape: Tape, work: Work, heads: Heads, gradient: Storage, saved: list[Storage | None]) -> Gradients:
    e, tokens = work.element, work.tokens
    queries = FP32 * tokens * heads.queries * heads.qk
    pair = tokens * heads.keys * (heads.qk + heads.v)
    precise = (tape.new(queries), tape.new(FP32 * tokens * heads.queries * heads.v)) if work.narrow else ()
    tape.passing(FP32 * tokens * heads.queries * heads.v)
    delta = tape.new(FP32 * tokens * heads.queries)
    of_q, of_pair = tape.new(queries), tape.new(FP32 * pair)
    arriving = tape.new(e * pair)
    sent, arrived = tape.hold(of_pair), tape.hold(of_pair)  # no gradient has travelled yet
    block = _Block(tape, work, heads)
    for step in range(2 * BLOCKS):
        if step == BLOCKS:  # gradients go on to the next rank, in the keys' format, and those of another rank come
            tape.drop(sent, arrived)
            sent = tape.new(e * pair) if work.narrow else tape.hold(of_pair)
            arrived = tape.new(e * pair)
            following = tape.new(FP32 * pair) if work.narrow else tape.hold(arrived)
            tape.drop(of_pair)
            of_pair = following
        block.scores()
        block.weights()
        block.gradients()
    block.close()
    tape.drop(arriving, delta, of_pair, sent)
    whole_q = tape.new(e * tokens * heads.queries * heads.qk) if work.narrow else tape.hold(of_q)
    of_k, of_v = (tape.view(arrived, e * tokens * heads.keys * width) for width in (heads.qk, heads.v))
    tape.drop(arrived, of_q, *precise, gradient, *saved)
    return whole_q, of_k, of_v


class _Block:
    """The tensors of one block of scores, whose names hold them until the next block's take their place."""

    def __init__(self, tape: Tape, work: Work, heads: Heads) -> None:
        self.tape, self.heads = tape, heads
        self.half = work.tokens / 2  # tokens of a run, times sequences
        run = self.half / work.batch
        self.pairs = FP32 * work.batch * heads.queries * run * run
        self.mask_bytes = run * run
        self.names: dict[str, Storage] = {}

    def name(self, what: str, storage: Storage) -> None:
        self.tape.drop(self.names.pop(what, None))
        self.names[what] = storage

    def close(self) -> None:
        self.tape.drop(*self.names.values())
        self.names.clear()

    def scores(self) -> None:
        """Keys and values of the block in fp32 for every head, and the masked products."""
        tape, heads = self.tape, self.heads
        distance, allowed = tape.new(INDEX * self.mask_bytes), tape.new(self.mask_bytes)
        tape.drop(distance)
        self.name("allowed", allowed)
        width = heads.qk + heads.v
        pair = tape.new(FP32 * self.half * heads.keys * width)
        if heads.queries > heads.keys:
            repeated = tape.new(FP32 * self.half * heads.queries * width)
            tape.drop(pair)
            pair = repeated
        product, scaled = tape.new(self.pairs), tape.new(self.pairs)
        tape.drop(product)
        refused, masked = tape.new(self.mask_bytes), tape.new(self.pairs)
        tape.drop(scaled, refused)
        self.name("scores", masked)
        self.name("values", pair)

    def weights(self) -> None:
        shifted, weights = self.tape.new(self.pairs), self.tape.new(self.pairs)
        self.tape.drop(shifted)
        self.name("weights", weights)

    def gradients(self) -> None:
        """Of values, scores and keys."""
        tape, heads = self.tape, self.heads
        self.name("value gradient", tape.new(FP32 * self.half * heads.queries * heads.v))
        product, less = tape.new(self.pairs), tape.new(self.pairs)
        tape.drop(product)
        weighed = tape.new(self.pairs)
        tape.drop(less)
        scaled = tape.new(self.pairs)
        tape.drop(weighed)
        self.name("score gradient", scaled)
        self.name("keys", tape.new(FP32 * self.half * heads.queries * heads.qk))
        tape.passing(FP32 * self.half * heads.queries * heads.qk)
        self.name("key gradient", tape.new(FP32 * self.half * heads.queries * heads.qk))
