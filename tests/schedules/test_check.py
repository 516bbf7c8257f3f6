"""Every schedule is sound for any size; planted faults are found and named."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.layout.config import Schedule
from meshwright.schedules import (
    Action,
    ActionKind,
    Defect,
    PipelineSchedule,
    batches,
    build,
    check,
    is_v_shaped,
    with_communication,
)
from meshwright.schedules.actions import COMMUNICATION, RECEIVES, SENDS, message_of


@st.composite
def sizes(draw: st.DrawFn) -> tuple[Schedule, int, int, int]:
    """(schedule, stages, microbatches, chunks per stage)."""
    schedule = draw(st.sampled_from(list(Schedule)))
    chunks = 2 if is_v_shaped(schedule) else draw(st.integers(2, 4)) if schedule is Schedule.INTERLEAVED else 1
    return schedule, draw(st.integers(1, 9)), draw(st.integers(1, 24)), chunks


def swap(schedule: PipelineSchedule, stage: int, i: int, j: int) -> PipelineSchedule:
    actions = list(schedule.actions[stage])
    actions[i], actions[j] = actions[j], actions[i]
    return with_stage(schedule, stage, actions)


def with_stage(schedule: PipelineSchedule, stage: int, actions: list[Action]) -> PipelineSchedule:
    every = list(schedule.actions)
    every[stage] = tuple(actions)
    return replace(schedule, actions=tuple(every))


def defects(schedule: PipelineSchedule) -> set[Defect]:
    return {p.defect for p in check(schedule).problems}


@given(sizes(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_schedule_of_any_size_passes_the_check_with_and_without_messages(
    size: tuple[Schedule, int, int, int], forward_only: bool
) -> None:
    built = build(*size, forward_only=forward_only)
    assert check(built).problems == ()
    assert check(with_communication(built)).problems == ()


@given(sizes())
@settings(max_examples=60, deadline=None)
def test_messages_of_a_pair_follow_one_order_so_that_even_blocking_sends_cannot_deadlock(
    size: tuple[Schedule, int, int, int],
) -> None:
    """Run with the strictest semantics: one message at a time, a send and its receive pass both stages together."""
    schedule = with_communication(build(*size))
    at = [0] * schedule.stages
    work = list(range(schedule.stages))
    while work:
        stage = work.pop()
        while at[stage] < len(schedule.actions[stage]):
            action = schedule.actions[stage][at[stage]]
            if action.kind in COMMUNICATION:
                peer = schedule.peer(action)
                if at[peer] == len(schedule.actions[peer]):
                    break
                other = schedule.actions[peer][at[peer]]
                if not (
                    (action.kind in SENDS and other == message_of(action))
                    or (other.kind in SENDS and message_of(other) == action)
                ):
                    break
                at[peer] += 1
                work.append(peer)
            at[stage] += 1
    assert at == [len(a) for a in schedule.actions]


@given(sizes())
@settings(max_examples=40, deadline=None)
def test_a_stage_never_sends_to_itself(size: tuple[Schedule, int, int, int]) -> None:
    schedule = with_communication(build(*size))
    for stage, actions in enumerate(schedule.actions):
        assert all(schedule.peer(a) != stage for a in actions if a.kind in COMMUNICATION)


def test_adding_messages_twice_changes_nothing() -> None:
    once = with_communication(build(Schedule.ZBV, 3, 7, 2))
    assert with_communication(once) == once


def test_a_dropped_receive_is_found_and_named() -> None:
    schedule = with_communication(build(Schedule.ONE_F_ONE_B, 3, 5))
    receive = next(a for a in schedule.actions[1] if a.kind in RECEIVES)
    broken = with_stage(schedule, 1, [a for a in schedule.actions[1] if a != receive])
    problems = check(broken).problems
    named = [p for p in problems if p.defect is Defect.NO_RECEIVE]
    assert named
    assert str(receive) in named[0].text
    assert "stage 0 sends to stage 1" in named[0].text


def test_a_dropped_send_is_found_and_named() -> None:
    schedule = with_communication(build(Schedule.INTERLEAVED, 2, 4, 2))
    send = next(a for a in schedule.actions[0] if a.kind in SENDS)
    broken = with_stage(schedule, 0, [a for a in schedule.actions[0] if a != send])
    assert {Defect.MISSING, Defect.NO_SEND} <= defects(broken)


def test_messages_in_another_order_than_they_are_sent_are_found() -> None:
    schedule = with_communication(build(Schedule.GPIPE, 2, 3))
    first, second = [i for i, a in enumerate(schedule.actions[1]) if a.kind is ActionKind.RECEIVE_FORWARD][:2]
    problems = check(swap(schedule, 1, first, second)).problems
    assert Defect.ORDER in {p.defect for p in problems}
    assert any("RF1.0" in p.text and "RF1.1" in p.text for p in problems)


def test_a_cycle_names_the_stages_that_wait_for_each_other() -> None:
    schedule = build(Schedule.ONE_F_ONE_B, 2, 2)
    # Stage 0 wants the gradient of microbatch 0 before it runs the forward of 1; stage 1 wants it the other way round.
    broken = with_stage(schedule, 0, [Action(k, 0, mb) for k, mb in _kinds("F0 B0 F1 B1")])
    broken = with_stage(broken, 1, [Action(k, 1, mb) for k, mb in _kinds("F0 F1 B0 B1")])
    problems = check(broken).problems
    assert [p.defect for p in problems] == [Defect.CYCLE]
    assert "stage 0 at B0.0 waits for B1.0 of stage 1" in problems[0].text
    assert "stage 1 at F1.1 waits for F0.1 of stage 0" in problems[0].text


def test_blocking_sends_that_cross_are_a_cycle() -> None:
    """1F1B written with plain send and receive: both stages send first (the classic gloo deadlock)."""
    schedule = with_communication(build(Schedule.ONE_F_ONE_B, 2, 3))
    split = with_stage(schedule, 0, [*_computation_between(schedule, 0)])
    assert Defect.CYCLE in defects(split)


def _computation_between(schedule: PipelineSchedule, stage: int) -> list[Action]:
    """The stage's actions with its second receive delayed past the next forward: sends first, receives later."""
    actions = list(schedule.actions[stage])
    first_receive = next(i for i, a in enumerate(actions) if a.kind is ActionKind.RECEIVE_BACKWARD)
    receive, backward = actions[first_receive : first_receive + 2]
    rest = actions[:first_receive] + actions[first_receive + 2 :]
    return [*rest, receive, backward]


def _kinds(text: str) -> list[tuple[ActionKind, int]]:
    return [(ActionKind(word[0]), int(word[1:])) for word in text.split()]


def test_a_backward_before_its_forward_is_stuck() -> None:
    schedule = build(Schedule.GPIPE, 1, 2)
    assert defects(swap(schedule, 0, 0, 2)) == {Defect.STUCK}


def test_missing_repeated_and_misplaced_actions_are_named() -> None:
    schedule = build(Schedule.ZB_H1, 2, 3)
    actions = list(schedule.actions[0])
    weight = next(a for a in actions if a.kind is ActionKind.BACKWARD_WEIGHT)
    dropped = check(with_stage(schedule, 0, [a for a in actions if a != weight])).problems
    assert [p.defect for p in dropped] == [Defect.MISSING]
    assert "weight gradient of chunk 0" in dropped[0].text
    assert defects(with_stage(schedule, 0, [*actions, weight])) == {Defect.REPEATED}
    stranger = Action(ActionKind.FORWARD, 1, 0)
    assert Defect.MISPLACED in defects(with_stage(schedule, 0, [*actions, stranger]))
    nowhere = Action(ActionKind.FORWARD, 5, 0)
    assert Defect.MISPLACED in defects(with_stage(schedule, 0, [*actions, nowhere]))


def test_batches_gather_neighbouring_messages_and_leave_computation_alone() -> None:
    schedule = with_communication(build(Schedule.INTERLEAVED, 2, 2, 2))
    for actions in schedule.actions:
        groups = batches(actions)
        assert tuple(a for g in groups for a in g) == actions
        assert all(len(g) == 1 or all(a.kind in COMMUNICATION for a in g) for g in groups)
        kinds = [g[0].kind in COMMUNICATION for g in groups]
        assert not any(a and b for a, b in pairwise(kinds))


@pytest.mark.parametrize(
    ("schedule", "stages", "microbatches", "chunks", "words"),
    [
        (Schedule.GPIPE, 0, 1, 1, "pipeline stages must be at least 1"),
        (Schedule.GPIPE, 1, 0, 1, "microbatches must be at least 1"),
        (Schedule.GPIPE, 1, 1, -1, "chunks per stage must be at least 1"),
        (Schedule.ONE_F_ONE_B, 2, 2, 2, "use vpp=1 or schedule interleaved-1f1b"),
        (Schedule.INTERLEAVED, 2, 2, 1, "use vpp=2 or schedule 1f1b"),
        (Schedule.ZBV, 2, 2, 1, "use vpp=2, not vpp=1"),
        (Schedule.DUALPIPEV, 2, 2, 3, "use vpp=2, not vpp=3"),
    ],
)
def test_sizes_that_cannot_be_are_refused_in_one_line(
    schedule: Schedule, stages: int, microbatches: int, chunks: int, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        build(schedule, stages, microbatches, chunks)
