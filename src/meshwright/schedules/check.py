"""Prove a schedule before it runs: `check(schedule) -> CheckResult`.

In: a schedule, with or without explicit messages. Out: every defect in words - an action missing, twice or on the
wrong stage; a receive without its send; messages between two stages out of order; stages that wait for each other -
and the most activations each stage holds at once, in chunk-microbatches.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest

from meshwright.schedules.actions import (
    COMMUNICATION,
    RECEIVES,
    SENDS,
    Action,
    ActionKind,
    PipelineSchedule,
    message_of,
)
from meshwright.schedules.communication import send_after
from meshwright.schedules.progress import cycle_among, progress


class Defect(StrEnum):
    """What can be wrong with a schedule."""

    MISSING = "missing action"
    REPEATED = "repeated action"
    MISPLACED = "misplaced action"
    NO_SEND = "receive without send"
    NO_RECEIVE = "send without receive"
    ORDER = "messages out of order"
    CYCLE = "cycle"
    STUCK = "stuck"


@dataclass(frozen=True)
class Problem:
    """A defect and where it is."""

    defect: Defect
    stage: int
    text: str

    def __str__(self) -> str:
        return f"{self.defect}: {self.text}"


@dataclass(frozen=True)
class CheckResult:
    """Problems found (none: the schedule is sound) and peak live activations per stage."""

    problems: tuple[Problem, ...]
    peak_live: tuple[int, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def check(schedule: PipelineSchedule) -> CheckResult:
    """Everything that can be said of a schedule without running it."""
    strangers = _strangers(schedule)
    if strangers:  # nothing else can be said of chunks that do not exist
        return CheckResult(tuple(strangers), tuple(peak_live(stage) for stage in schedule.actions))
    problems = [*_counted(schedule), *_messages(schedule)]
    waits = progress(schedule)
    ring = cycle_among(waits)
    if ring:
        text = "; ".join(str(w) for w in ring)
        problems.append(Problem(Defect.CYCLE, ring[0].stage, text))
    else:
        problems += [Problem(Defect.STUCK, w.stage, str(w)) for w in waits]
    return CheckResult(tuple(problems), tuple(peak_live(stage) for stage in schedule.actions))


def peak_live(actions: tuple[Action, ...]) -> int:
    """Most activations a stage holds at once: held from the forward pass until the weight gradient is made."""
    live = peak = 0
    for action in actions:
        if action.kind is ActionKind.FORWARD:
            live += 1
        elif action.kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_WEIGHT):
            live -= 1
        peak = max(peak, live)
    return peak


def _strangers(schedule: PipelineSchedule) -> list[Problem]:
    """Actions of chunks or microbatches that the schedule does not have."""
    return [
        Problem(Defect.MISPLACED, stage, f"{action} on stage {stage} does not exist")
        for stage, actions in enumerate(schedule.actions)
        for action in actions
        if not (0 <= action.chunk < schedule.total_chunks and 0 <= action.microbatch < schedule.microbatches)
    ]


def _counted(schedule: PipelineSchedule) -> list[Problem]:
    """Every forward, input gradient and weight gradient once per chunk and microbatch, on the chunk's stage."""
    problems: list[Problem] = []
    seen: Counter[tuple[str, int, int]] = Counter()
    for stage, actions in enumerate(schedule.actions):
        for action in actions:
            if schedule.owner(action.chunk) != stage:
                owner = schedule.owner(action.chunk)
                problems.append(Problem(Defect.MISPLACED, stage, f"{action} on stage {stage} belongs to {owner}"))
            for work in _work_of(action):
                seen[work, action.chunk, action.microbatch] += 1
    expected = ("forward",) if schedule.forward_only else ("forward", "input gradient", "weight gradient")
    for chunk in range(schedule.total_chunks):
        for microbatch in range(schedule.microbatches):
            for work in expected:
                times = seen.pop((work, chunk, microbatch), 0)
                if times != 1:
                    text = f"{work} of chunk {chunk}, microbatch {microbatch} happens {times} times"
                    defect = Defect.REPEATED if times else Defect.MISSING
                    problems.append(Problem(defect, schedule.owner(chunk), text))
    for work, chunk, microbatch in seen:
        text = f"{work} of chunk {chunk}, microbatch {microbatch} in a forward-only schedule"
        problems.append(Problem(Defect.MISPLACED, schedule.owner(chunk), text))
    return problems


def _work_of(action: Action) -> tuple[str, ...]:
    match action.kind:
        case ActionKind.FORWARD:
            return ("forward",)
        case ActionKind.BACKWARD:
            return ("input gradient", "weight gradient")
        case ActionKind.BACKWARD_INPUT:
            return ("input gradient",)
        case ActionKind.BACKWARD_WEIGHT:
            return ("weight gradient",)
        case _:
            return ()


def _messages(schedule: PipelineSchedule) -> list[Problem]:
    """Where messages are explicit: each result that travels is sent once and received once, in one order per pair."""
    if not any(a.kind in COMMUNICATION for stage in schedule.actions for a in stage):
        return []
    problems: list[Problem] = []
    sent: dict[tuple[int, int], list[Action]] = {}
    received: dict[tuple[int, int], list[Action]] = {}
    for stage, actions in enumerate(schedule.actions):
        due = _sends_due(schedule, actions)
        made = Counter(a for a in actions if a.kind in SENDS)
        problems += [Problem(Defect.MISSING, stage, f"{a} of stage {stage} is not sent") for a in due - made]
        problems += [Problem(Defect.REPEATED, stage, f"{a} of stage {stage} is not called for") for a in made - due]
        for action in actions:
            if action.kind in SENDS and action in due:
                sent.setdefault((stage, schedule.peer(action)), []).append(message_of(action))
            elif action.kind in RECEIVES:
                if not _has_peer(schedule, action):
                    text = f"{action} of stage {stage} receives from nowhere"
                    problems.append(Problem(Defect.NO_SEND, stage, text))
                    continue
                received.setdefault((schedule.peer(action), stage), []).append(action)
    for pair in sorted(sent.keys() | received.keys()):
        problems += _pair(pair, sent.get(pair, []), received.get(pair, []))
    return problems


def _sends_due(schedule: PipelineSchedule, actions: tuple[Action, ...]) -> Counter[Action]:
    sends = [send_after(schedule, a) for a in actions]
    return Counter([send for send in sends if send is not None])


def _has_peer(schedule: PipelineSchedule, receive: Action) -> bool:
    boundary = receive.chunk - 1 if receive.kind is ActionKind.RECEIVE_FORWARD else receive.chunk
    return boundary >= 0 and boundary + 1 < schedule.total_chunks and schedule.sends_forward(boundary)


def _pair(pair: tuple[int, int], sent: list[Action], received: list[Action]) -> list[Problem]:
    """Problems of the messages from one stage to another, both given as receives."""
    sender, receiver = pair
    unsent, unreceived = Counter(received) - Counter(sent), Counter(sent) - Counter(received)
    problems = [
        Problem(Defect.NO_SEND, receiver, f"{a} of stage {receiver} has no send on stage {sender}") for a in unsent
    ]
    problems += [
        Problem(Defect.NO_RECEIVE, sender, f"stage {sender} sends to stage {receiver}, which has no {a}")
        for a in unreceived
    ]
    if not problems:
        for mine, theirs in zip_longest(sent, received):
            if mine != theirs:
                text = f"stage {sender} sends for {mine} where stage {receiver} expects {theirs}"
                problems.append(Problem(Defect.ORDER, receiver, text))
                break
    return problems
