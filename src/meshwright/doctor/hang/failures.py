"""Errors that ranks raised: which came first, which only follow from another rank's end.

In: the evidence and the records that failed ranks left. Out: a verdict, or None where no error is the cause.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from meshwright.doctor.hang.evidence import Evidence
from meshwright.doctor.hang.finding import Cause, Verdict
from meshwright.doctor.hang.words import action_words, doing
from meshwright.flight import RankLog
from meshwright.flight.incident import Failure
from meshwright.flight.layout import FAILED, SAVING, STARTING, STEPPING

CONSEQUENCES = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out|timeout|socket|store|gloo|nccl|peer|watchdog", re.I
)
"""What an error says that another rank's death causes."""
IN_CHECKPOINT = re.compile(r"(?:cannot be written by rank |CheckpointException ranks:dict_keys\(\[)(\d{1,7})")
"""How runtime.checkpoint and torch say whose files could not be written; all ranks raise it."""


def as_noticed(
    logs: Sequence[RankLog], failures: Sequence[Failure], noticed_ns: int
) -> tuple[list[RankLog], list[Failure]]:
    """Logs and failures without what the end of the job has added to them after somebody had noticed: ranks that then
    lost a peer count as waiting in the call in which they lost it."""
    late = {f.rank for f in failures if f.at_ns > noticed_ns and _is_consequence(f)}
    before = [
        replace(log, now=replace(log.now, activity=STEPPING))
        if log.now.activity == FAILED and log.identity.rank in late
        else log
        for log in logs
    ]
    return before, [f for f in failures if f.rank not in late]


def of_failure(evidence: Evidence, failures: Sequence[Failure], consequences: bool = False) -> Verdict | None:
    """The first error that is not another rank's death in disguise."""
    own = [f for f in failures if consequences or not _is_consequence(f)]
    if not own:
        return None
    first = own[0]
    named = IN_CHECKPOINT.search(first.message)  # torch raises the error of one rank on all of them
    if named and int(named[1]) in evidence.log_of:
        first = next((f for f in own if f.rank == int(named[1])), replace(first, rank=int(named[1])))
    where = {SAVING: "while it wrote a checkpoint", STARTING: "before its first step"}.get(first.doing, "in a step")
    log = evidence.log_of.get(first.rank)
    action = None if log is None else action_words(log.now.action, log.now.chunk, log.now.microbatch)
    if action and first.doing not in (SAVING, STARTING):
        where = f"in the {action}"
    line = first.message.strip().splitlines()
    said = f"{evidence.name(first.rank)} failed {where}: {first.kind}: {line[0] if line else ''}".rstrip(": ")
    return Verdict(Cause.FAILED, (first.rank,), said, action=first.doing if action is None else action)


def _is_consequence(failure: Failure) -> bool:
    if IN_CHECKPOINT.search(failure.message):  # names a path, in which any word may stand
        return False
    return CONSEQUENCES.search(f"{failure.kind} {failure.message}") is not None


def without_a_word(evidence: Evidence, failures: Sequence[Failure]) -> Verdict | None:
    """A rank that failed and could not write down why, where others at most wrote that they had lost a peer."""
    told = {f.rank for f in failures}
    silent = [log for log in evidence.logs if log.now.activity == FAILED and log.identity.rank not in told]
    if not silent:
        return None
    log = min(silent, key=lambda log: log.now.updated_ns)
    rank = log.identity.rank
    said = (
        f"{evidence.name(rank)} failed {doing(evidence, rank)}, and could not write its error down (is its disk full?)"
    )
    action = action_words(log.now.action, log.now.chunk, log.now.microbatch)
    return Verdict(Cause.FAILED, (rank,), said, action=action)
