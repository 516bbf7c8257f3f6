"""Core attention: queries, keys and values in, mixed values out; what its kernel keeps and what its backward pass
makes.

Kinds: the flash kernel (q, k, v, output and log-sum-exp kept), the same under an explicit mask (sliding windows: heads
repeated, a mask over s^2 pairs), the all-to-all from tokens to heads and back, and the ring (`ring.py`). Selective
recomputation wraps any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from meshwright.cost.program.tape import Storage, Tape
from meshwright.cost.program.work import FP32, Work

Gradients = tuple[Storage, Storage, Storage]
CoreBackward = Callable[[Storage], Gradients]


@dataclass(frozen=True)
class Heads:
    """Heads of a rank, query and key/value, and their sizes. `window`: keys that a query sees (None: all before it)."""

    queries: float
    keys: float
    qk: float
    v: float
    window: int | None = None


Core = Callable[[Tape, Work, Heads, Storage, Storage, Storage], tuple[Storage, CoreBackward]]


def core_of(work: Work, heads: Heads, selective: bool) -> Core:
    """The attention function that the runtime registers for a setting."""
    from meshwright.cost.program.ring import ring

    if work.cp > 1:
        core: Core = exchanged if work.exchanged else ring
    else:
        core = masked if heads.window is not None and heads.window < work.seq else padded
    return recomputed(core) if selective else core


def flash(tape: Tape, work: Work, heads: Heads, q: Storage, k: Storage, v: Storage) -> tuple[Storage, CoreBackward]:
    """Dao et al. 2022: nothing of size s^2."""
    tokens, e = work.tokens, work.element
    out = tape.new(e * tokens * heads.queries * heads.v)
    log_sum = tape.new(FP32 * tokens * heads.queries)
    kept = [tape.save(x) for x in (q, k, v, out, log_sum)]
    tape.drop(log_sum)

    def backward(gradient: Storage) -> Gradients:
        of_q = tape.new(e * tokens * heads.queries * heads.qk)
        of_k = tape.new(e * tokens * heads.keys * heads.qk)
        of_v = tape.new(e * tokens * heads.keys * heads.v)
        tape.drop(gradient, *kept)
        return of_q, of_k, of_v

    return out, backward


def padded(tape: Tape, work: Work, heads: Heads, q: Storage, k: Storage, v: Storage) -> tuple[Storage, CoreBackward]:
    """The flash kernel wants values as wide as keys: narrower ones (latent attention) get columns of zeros."""
    if heads.v == heads.qk:
        return flash(tape, work, heads, q, k, v)
    even = Heads(heads.queries, heads.keys, heads.qk, heads.qk)
    wide = tape.new(work.element * work.tokens * heads.keys * heads.qk)
    whole, whole_backward = flash(tape, work, even, q, k, wide)
    tape.drop(wide)
    out = tape.new(work.element * work.tokens * heads.queries * heads.v)  # its first columns, contiguous
    tape.drop(whole)

    def backward(gradient: Storage) -> Gradients:
        padded_gradient = tape.new(work.element * work.tokens * heads.queries * heads.qk)
        tape.drop(gradient)
        return whole_backward(padded_gradient)

    return out, backward


def masked(tape: Tape, work: Work, heads: Heads, q: Storage, k: Storage, v: Storage) -> tuple[Storage, CoreBackward]:
    """With a mask transformers repeats the key and value heads, and the kernel keeps the mask as numbers."""
    e, tokens = work.element, work.tokens
    repeats = heads.queries > heads.keys
    every = Heads(heads.queries, heads.queries, heads.qk, heads.v)
    keys, values = tape.hold(k), tape.hold(v)
    if repeats:
        tape.drop(keys, values)
        keys, values = (tape.new(e * tokens * heads.queries * width) for width in (heads.qk, heads.v))
    mask = tape.new(e * work.seq**2)
    saved_mask = tape.save(mask)
    out, every_backward = flash(tape, work, every, q, keys, values)
    tape.drop(mask, keys, values)

    def backward(gradient: Storage) -> Gradients:
        of_q, of_k, of_v = every_backward(gradient)
        tape.drop(saved_mask)
        if repeats:
            summed_v = tape.new(e * tokens * heads.keys * heads.v)
            tape.drop(of_v)
            summed_k = tape.new(e * tokens * heads.keys * heads.qk)
            tape.drop(of_k)
            of_k, of_v = summed_k, summed_v
        return of_q, of_k, of_v

    return out, backward


def exchanged(tape: Tape, work: Work, heads: Heads, q: Storage, k: Storage, v: Storage) -> tuple[Storage, CoreBackward]:
    """DeepSpeed Ulysses (Jacobs et al. 2023): 1/c of the heads over the whole sequence. A sliding window makes a
    mask."""
    e, whole = work.element, Work(work.batch, work.seq, work.hidden, work.element)
    key_heads = max(heads.keys, work.cp)
    inner = Heads(heads.queries / work.cp, key_heads / work.cp, heads.qk, heads.v)
    windowed = heads.window is not None and heads.window < work.seq

    def to_heads(width: float, count: float, repeated: bool) -> Storage:
        size = e * work.tokens * max(count, work.cp) * width
        source = tape.new(size) if repeated else None
        by_rank, arrived = tape.new(size), tape.new(size)
        ordered = tape.new(size)
        tape.drop(by_rank, arrived, source)
        chosen = tape.new(size)
        tape.drop(ordered)
        return chosen

    repeated = heads.keys < work.cp
    queries = to_heads(heads.qk, heads.queries, repeated=False)
    keys, values = (to_heads(width, heads.keys, repeated) for width in (heads.qk, heads.v))
    mask = tape.new(e * work.seq**2) if windowed else None
    saved_mask = tape.save(mask) if mask else None
    mixed, inner_backward = flash(tape, whole, inner, queries, keys, values)
    size = e * work.tokens * heads.queries * heads.v
    chosen = tape.new(size)
    by_rank, arrived = tape.new(size), tape.new(size)
    tape.drop(chosen, by_rank)
    out = tape.new(size)
    tape.drop(arrived, mixed, queries, keys, values, mask)

    def back_to_tokens(gradient: Storage, repeated: bool) -> Storage:
        zeros, placed = tape.new(gradient.nbytes), tape.new(gradient.nbytes)
        tape.drop(zeros, gradient)
        arrived = tape.new(gradient.nbytes)
        tape.passing(gradient.nbytes)
        tape.drop(placed)
        if repeated:
            summed = tape.new(gradient.nbytes * heads.keys / work.cp)
            tape.drop(arrived)
            return summed
        return arrived

    def backward(gradient: Storage) -> Gradients:
        arrived = tape.new(size)
        tape.passing(size)
        tape.drop(gradient)
        ordered = tape.new(size)
        tape.drop(arrived)
        zeros, placed = tape.new(size), tape.new(size)
        tape.drop(zeros, ordered)
        of_q, of_k, of_v = inner_backward(placed)
        tape.drop(saved_mask)
        of_v = back_to_tokens(of_v, repeated)
        of_k = back_to_tokens(of_k, repeated)
        return back_to_tokens(of_q, repeated=False), of_k, of_v

    return out, backward


def recomputed(core: Core) -> Core:
    """Core attention inside a checkpoint: its inputs are kept, the rest is made again."""

    def run(tape: Tape, work: Work, heads: Heads, q: Storage, k: Storage, v: Storage) -> tuple[Storage, CoreBackward]:
        with tape.forgetting():
            out, _ = core(tape, work, heads, q, k, v)
        kept = [tape.save(x) for x in (q, k, v)]

        def backward(gradient: Storage) -> Gradients:
            again, core_backward = core(tape, work, heads, q, k, v)
            tape.drop(again)
            gradients = core_backward(gradient)
            tape.drop(*kept)
            return gradients

        return out, backward

    return run
