"""Decide what is wrong with a job that stands still, and say it in one sentence: ranks, coordinates, hosts, action.

In: a run's folder, live or left behind. Out: a `Verdict`. Evidence is weighed in this order: ranks without a log, ranks
with another plan, a disagreement between members of a group, an error that a rank raised by itself, a dead process, the
root of the waiting, messages that do not arrive, and, where nothing stands still, a slow rank.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from meshwright.doctor.flight_recorder import read_dumps
from meshwright.doctor.hang.evidence import Evidence
from meshwright.doctor.hang.failures import as_noticed, of_failure, without_a_word
from meshwright.doctor.hang.finding import Cause, Verdict
from meshwright.doctor.hang.mismatch import Mismatch, first_deviation, first_mismatch
from meshwright.doctor.hang.slow import slow_rank
from meshwright.doctor.hang.waits import Wait, Waiting, is_over, waiting
from meshwright.doctor.hang.words import MOST_NAMED, action_of, action_words, call_words, doing, named
from meshwright.flight import FLIGHT_FOLDER, RankLog, read_folder
from meshwright.flight.incident import Failure, read_failures, read_states
from meshwright.flight.layout import ENDED, FAILED
from meshwright.flight.processes import ProcessState, states_of
from meshwright.flight.reader import SUFFIX

MISMATCH_CAUSES = {
    "order": Cause.ORDER,
    "skipped": Cause.SKIPPED,
    "extra": Cause.EXTRA,
    "size": Cause.SIZE,
    "dtype": Cause.DTYPE,
}


def diagnose_hang(run: Path) -> Verdict:
    """The verdict on a run's folder - live, or left behind by a job that died or was ended by its watchdog - or on a
    folder of PyTorch Flight Recorder dumps."""
    flight = run / FLIGHT_FOLDER if (run / FLIGHT_FOLDER).is_dir() else run
    if not any(flight.glob(f"*{SUFFIX}")):  # a job that does not use our runtime
        dumps = read_dumps(flight)
        if dumps:
            return diagnose_logs(dumps)
    logs = read_folder(flight)
    failures = read_failures(flight.parent if flight.name == FLIGHT_FOLDER else run)
    taken = read_states(flight)
    if taken is not None:
        states, now_ns = taken
        logs, failures = as_noticed(logs, failures, now_ns)
    else:
        states, now_ns = states_of([log.identity for log in logs]), time.time_ns()
    return diagnose_logs(logs, states, failures, now_ns)


def diagnose_logs(
    logs: Sequence[RankLog],
    states: dict[int, ProcessState] | None = None,
    failures: Sequence[Failure] = (),
    now_ns: int | None = None,
) -> Verdict:
    """The same of logs at hand. `states`: of the ranks' processes when the logs were read; `now_ns`: when that was."""
    known = states or {}
    evidence = Evidence.of(logs)
    moment = now_ns if now_ns is not None else max(log.now.updated_ns for log in logs)
    found = waiting(evidence, known)
    mismatch = first_mismatch(evidence)
    return (
        _missing(evidence)
        or _another_plan(evidence)
        or (_of_mismatch(evidence, mismatch) if mismatch else None)
        or of_failure(evidence, failures)
        or without_a_word(evidence, failures)
        or _dead(evidence, known, found)
        or _of_root(evidence, known, found, moment)
        or of_failure(evidence, failures, consequences=True)
        or _of_transit(evidence, found, moment)
        or _of_circle(evidence, found)
        or _of_slow(evidence)
        or _nothing(evidence)
    )


def _missing(evidence: Evidence) -> Verdict | None:
    if not evidence.missing:
        return None
    some = ", ".join(str(r) for r in evidence.missing[:MOST_NAMED])
    more = len(evidence.missing) - MOST_NAMED
    ranks = f"rank {some}" + (f" and {more} more" if more > 0 else "")
    sentence = (
        f"{ranks} of {evidence.world} left no log: never started, died before its groups existed, or wrote elsewhere"
    )
    return Verdict(Cause.MISSING, evidence.missing, sentence)


def _another_plan(evidence: Evidence) -> Verdict | None:
    digests = Counter(log.identity.digest for log in evidence.logs)
    if len(digests) == 1:
        return None
    common = digests.most_common(1)[0][0]
    ranks = tuple(log.identity.rank for log in evidence.logs if log.identity.digest != common)
    return Verdict(Cause.PLAN, ranks, f"{named(evidence, ranks)} runs another plan than the other ranks")


def _of_mismatch(evidence: Evidence, found: Mismatch) -> Verdict:
    group = evidence.groups[found.group]
    called, expected = call_words(evidence, found.called), call_words(evidence, found.expected)
    who, witness = evidence.name(found.culprit), evidence.name(found.witness)
    where = f"call {found.sequence} of the {group.axis} group of {len(group.ranks)}"
    said = {
        "dtype": f"{who} called {called} in {where}, where {witness} called {expected}: the types differ",
        "size": f"{who} called {called} in {where}, where {witness} called {expected}: the sizes differ",
        "order": f"{who} called {called} as {where}, where {expected} is due (as {witness} did): swapped, or left out",
        "skipped": f"{who} left out {expected}, {where}, and went on to {called}; {witness} did not",
        "extra": f"{who} called {called} in {where}, which {witness} did not; then {expected} as it should",
    }[found.kind]
    if not found.certain:
        said += " (it may also be the other way round: only two ranks speak, and no step before to compare with)"
    action = action_of(evidence, found.called)
    return Verdict(MISMATCH_CAUSES[found.kind], (found.culprit,), said, group.axis, action, group.ranks)


def _dead(evidence: Evidence, states: dict[int, ProcessState], found: Waiting) -> Verdict | None:
    gone = tuple(
        log.identity.rank
        for log in evidence.logs
        if states.get(log.identity.rank) is ProcessState.GONE and log.now.activity not in (ENDED, FAILED)
    )
    if not gone or len(gone) == len(evidence.logs):  # all gone: the whole job was ended, that tells nothing
        return None
    what = doing(evidence, gone[0])
    said = f"the process of {named(evidence, gone)} is gone without a word, {what}"
    return Verdict(Cause.DEAD, gone, said, _awaited_axis(evidence, found, gone[0]), what)


def _awaited_axis(evidence: Evidence, found: Waiting, rank: int) -> str | None:
    """The axis on which others wait for a rank (most of them)."""
    axes = Counter(evidence.groups[w.group].axis for w in found.waits.values() if rank in w.laggards)
    if not axes:  # those that waited for it have failed already, in the call in which they lost it
        groups = [
            evidence.groups[evidence.group_of[(log.identity.rank, log.now.waiting_group)]]
            for log in evidence.logs
            if log.now.activity == FAILED and log.now.waiting_group >= 0
        ]
        axes = Counter(group.axis for group in groups if rank in group.ranks)
    return axes.most_common(1)[0][0] if axes else None


def _of_root(evidence: Evidence, states: dict[int, ProcessState], found: Waiting, now_ns: int) -> Verdict | None:
    if found.root is None:
        return None
    root, first = found.root, found.waits[found.chain[0]]
    log, state = evidence.log_of.get(root), states.get(root, ProcessState.UNKNOWN)
    waits = _waits_in(evidence, first, now_ns)
    behind_s = max(0.0, (now_ns - first.since_ns) / 1e9)
    if is_over(log, state):
        ended = "has left the job" if log is None or log.now.activity != FAILED else "failed"
        cause, said = Cause.DEAD, f"{waits} for {evidence.name(root)}, which {ended}"
    elif state is ProcessState.STOPPED:
        cause, said = (
            Cause.STOPPED,
            f"{waits} for {evidence.name(root)}, whose process is stopped, {doing(evidence, root)}",
        )
    else:
        cause, said = Cause.WAITED_FOR, f"{waits} for {evidence.name(root)}, which is still {doing(evidence, root)}"
    last = found.waits[found.chain[-2]] if len(found.chain) > 1 else first
    details = [f"{found.behind} ranks wait for it, directly or through others"]
    slow = slow_rank(evidence)
    if slow is not None and slow.rank == root:
        details.append(f"it was the slowest rank in {slow.slowest_in} of the last {slow.steps} steps")
    action = None if log is None else action_words(log.now.action, log.now.chunk, log.now.microbatch)
    group = evidence.groups[last.group]
    return Verdict(cause, (root,), said, group.axis, action, group.ranks, behind_s, found.chain, tuple(details))


def _waits_in(evidence: Evidence, wait: Wait, now_ns: int) -> str:
    """'dp1 pp2 tp0 (rank 20, node-3) has waited 41 s in the backward pass of chunk 2, microbatch 3 (pp)'."""
    log = evidence.log_of[wait.rank]
    action = action_words(log.now.action, log.now.chunk, log.now.microbatch)
    since = max(0.0, (now_ns - wait.since_ns) / 1e9)
    place = f" in the {action}" if action else ""
    axis = evidence.groups[wait.group].axis
    return f"{evidence.name(wait.rank)} has waited {since:.0f} s{place} (axis {axis})"


def _of_transit(evidence: Evidence, found: Waiting, now_ns: int) -> Verdict | None:
    if not found.in_transit:
        return None
    first = found.in_transit[0]
    group = evidence.groups[first.group]
    ends = (first.rank, first.peer) if first.peer >= 0 else group.ranks
    hosts = sorted({evidence.log_of[r].identity.host for r in ends if r in evidence.log_of})
    between = f"between {hosts[0]} and {', '.join(hosts[1:])}" if len(hosts) > 1 else f"inside {hosts[0]}"
    said = f"{_waits_in(evidence, first, now_ns)} for what all {len(ends)} ranks have called: nothing arrives {between}"
    behind_s = max(0.0, (now_ns - first.since_ns) / 1e9)
    log = evidence.log_of[first.rank]
    action = action_words(log.now.action, log.now.chunk, log.now.microbatch) or doing(evidence, first.rank)
    return Verdict(
        *(Cause.NETWORK, tuple(ends), said, group.axis, action, group.ranks, behind_s),
        details=_cut_off(evidence, found),
    )


def _cut_off(evidence: Evidence, found: Waiting) -> tuple[str, ...]:
    """How many ranks wait for what was sent, in groups that span hosts and in others: the first alone say a cable."""
    across: set[int] = set()
    inside: set[int] = set()
    for wait in found.in_transit:
        ends = (wait.rank, wait.peer) if wait.peer >= 0 else evidence.groups[wait.group].ranks
        hosts = {evidence.log_of[r].identity.host for r in ends if r in evidence.log_of}
        (across if len(hosts) > 1 else inside).add(wait.rank)
    if not across:
        return ()
    rest = f"{len(inside)} wait so inside a host" if inside else "none waits so inside a host"
    return (f"{len(across)} ranks wait for what another host has sent, {rest}",)


def _of_circle(evidence: Evidence, found: Waiting) -> Verdict | None:
    if not found.circle:
        return None
    axes = [evidence.groups[found.waits[r].group].axis for r in found.circle]
    steps = " -> ".join(f"{evidence.coordinates(r)} (axis {a})" for r, a in zip(found.circle, axes, strict=True))
    said = f"ranks wait for one another in a circle: {steps} -> {evidence.coordinates(found.circle[0])}"
    deviation = first_deviation(evidence, found.circle)
    if deviation is not None:
        called, due = deviation
        rank, group = int(evidence.rank[called]), evidence.groups[int(evidence.group[due])]
        left = (
            f"{evidence.name(rank)} called {call_words(evidence, called)} where {call_words(evidence, due)} was due, "
        )
        left += f"as in the step before (axis {group.axis}): swapped, or left out"
        return Verdict(
            *(Cause.ORDER, (rank,), left, group.axis, action_of(evidence, called), group.ranks),
            chain=found.circle,
            details=(said,),
        )
    return Verdict(Cause.CIRCLE, found.circle, said, axes[0], chain=found.circle)


def _of_slow(evidence: Evidence) -> Verdict | None:
    slow = slow_rank(evidence)
    if slow is None:
        return None
    said = (
        f"nothing stands still; {evidence.name(slow.rank)} was the slowest rank in {slow.slowest_in} of the last "
        f"{slow.steps} steps: {slow.ratio:.1f} times the own time of its stage's other ranks"
    )
    return Verdict(Cause.SLOW, (slow.rank,), said)


def _nothing(evidence: Evidence) -> Verdict:
    over = sum(log.now.activity == ENDED for log in evidence.logs)
    state = "the job has ended" if over == len(evidence.logs) else "all ranks go on"
    step = max(log.now.step for log in evidence.logs)
    return Verdict(Cause.NOTHING, (), f"nothing stands still: {state}, after step {step}")
