"""Multi-head latent attention (DeepSeek-V2/V3): low-rank products with norms between, part of each head rotated."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.cost.program.attention import laid_out
from meshwright.cost.program.core import Core, Heads
from meshwright.cost.program.parts import Result, enter, leave, linear, rms_norm
from meshwright.cost.program.tape import Backward, Storage, Tape
from meshwright.cost.program.work import Work


@dataclass(frozen=True)
class Ranks:
    """Widths of the low-rank products; `query` 0: queries come from one product. `rotary`: of each head."""

    query: float
    key_value: float
    rotary: float


def latent(tape: Tape, work: Work, x: Storage, heads: Heads, core: Core, ranks: Ranks) -> Result:
    """Low-rank outputs, their norms, whole queries and keys and the up-projected values are kept."""
    h, tokens, e = work.hidden, work.tokens, work.element
    entered, due, out_of = enter(tape, work, x, h)
    count = heads.queries
    steps: list[Backward] = []

    if ranks.query:
        low, of_low = linear(tape, work, entered, tokens, h, ranks.query, whole=True)
        normed, of_norm = rms_norm(tape, work, low, tokens, ranks.query)
        tape.drop(low)
        q, of_q_product = linear(tape, work, normed, tokens, ranks.query, count * heads.qk, due=due)
        tape.drop(normed)
        steps = [of_q_product, of_norm, of_low]
    else:
        q, of_q_product = linear(tape, work, entered, tokens, h, count * heads.qk, due=due)
        steps = [of_q_product]
    compressed_width = ranks.key_value + ranks.rotary
    compressed, of_compressed = linear(tape, work, entered, tokens, h, compressed_width, whole=True)
    normed, of_kv_norm = rms_norm(tape, work, compressed, tokens, ranks.key_value)
    plain = heads.qk - ranks.rotary
    up = count * (plain + heads.v)
    expanded, of_expanded = linear(tape, work, normed, tokens, ranks.key_value, up, due=due)
    tape.drop(normed)
    rotated_q = _rotate_pairs(tape, e * tokens * count * ranks.rotary)
    rotated_k = _rotate_pairs(tape, e * tokens * ranks.rotary)
    whole = e * tokens * count * heads.qk
    queries, keys = tape.new(whole), tape.new(whole)
    values = tape.view(expanded, e * tokens * count * heads.v)
    mixed, core_backward = core(tape, work, heads, queries, keys, values)
    out, of_mixed = linear(tape, work, mixed, tokens, count * heads.v, h)
    tape.drop(mixed)
    out, back_in = leave(tape, work, out, h)
    tape.drop(queries, keys, values, expanded, rotated_q, rotated_k, q, compressed, entered)

    def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
        of_q, of_k, of_v = core_backward(of_mixed(back_in(gradient)))
        of_expanded_out = tape.new(e * tokens * up)
        tape.drop(of_v)
        of_rotary_key = tape.new(e * tokens * ranks.rotary)
        of_normed = of_expanded(of_expanded_out)
        tape.drop(of_k)
        of_whole_q = tape.new(whole)
        tape.passing(*[e * tokens * count * ranks.rotary] * 2)
        tape.drop(of_q)
        of_low_kv = of_kv_norm(of_normed)
        of_compressed_out = tape.new(e * tokens * compressed_width)
        tape.drop(of_low_kv, of_rotary_key)
        total = of_compressed(of_compressed_out)
        of_query = laid_out(tape, of_whole_q)
        for step in steps[:-1]:
            of_query = step(of_query)
        return out_of(steps[-1](of_query, total), accumulated)

    return out, backward


def _rotate_pairs(tape: Tape, nbytes: float) -> Storage:
    """Interleaved rotation: halves are made and joined."""
    one = tape.new(nbytes / 2)
    tape.passing(nbytes / 2, nbytes / 2)
    other = tape.new(nbytes / 2)
    together = tape.new(nbytes)
    tape.drop(one, other)
    return together
