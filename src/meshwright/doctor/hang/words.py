"""Ranks, calls and actions in words, as verdicts say them."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.doctor.hang.evidence import Evidence
from meshwright.flight.layout import COLLECTIVES, SAVING, STARTING

MOST_NAMED = 4
"""Ranks named in a sentence; the rest are counted."""
ACTIONS = {
    "F": "forward pass",
    "B": "backward pass",
    "I": "backward pass of inputs",
    "W": "backward pass of weights",
    "SF": "sending forward",
    "RF": "receiving forward",
    "SB": "sending backward",
    "RB": "receiving backward",
}


def named(evidence: Evidence, ranks: Sequence[int]) -> str:
    shown = ", ".join(evidence.name(r) for r in ranks[:MOST_NAMED])
    more = len(ranks) - MOST_NAMED
    return shown + (f" and {more} more" if more > 0 else "")


def call_words(evidence: Evidence, row: int) -> str:
    """'all_reduce of mlp output (4,096 bytes float32, forward pass of chunk 0, microbatch 3)'."""
    call = evidence.calls[row]
    name = COLLECTIVES[int(call["collective"])].value
    what, dtype = call["what"].decode("ascii", "replace"), call["dtype"].decode("ascii", "replace")
    action = action_of(evidence, row)
    inside = f"{int(call['bytes']):,} bytes {dtype}".strip() + (f", {action}" if action else "")
    return f"{name} of {what} ({inside})"


def action_of(evidence: Evidence, row: int) -> str | None:
    call = evidence.calls[row]
    return action_words(call["action"].decode("ascii", "replace"), int(call["chunk"]), int(call["microbatch"]))


def action_words(kind: str, chunk: int, microbatch: int) -> str | None:
    if kind not in ACTIONS:
        return None
    return f"{ACTIONS[kind]} of chunk {chunk}, microbatch {microbatch}"


def doing(evidence: Evidence, rank: int) -> str:
    """'in the forward pass of chunk 0, microbatch 1, step 12'."""
    log = evidence.log_of[rank]
    action = action_words(log.now.action, log.now.chunk, log.now.microbatch)
    if log.now.activity == SAVING:
        return f"while writing the checkpoint after step {log.now.step}"
    if log.now.activity == STARTING:
        return "before its first step"
    return (
        f"in the {action}, step {log.now.step + 1}"
        if action
        else f"outside the schedule's actions, step {log.now.step + 1}"
    )
