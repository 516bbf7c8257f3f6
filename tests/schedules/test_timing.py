"""The timing model against the papers' formulas for bubble and peak activations."""

from __future__ import annotations

import pytest

from meshwright.layout.config import Schedule
from meshwright.schedules import Action, ActionKind, Durations, Timeline, build, check, simulate, with_communication

CASES = [(2, 4), (3, 6), (4, 8), (4, 24), (8, 16)]


def run(schedule: Schedule, p: int, m: int, v: int = 1, weight: float = 1.0) -> Timeline:
    """With F = 1, B = 2 per stage and microbatch."""
    built = build(schedule, p, m, v)
    return simulate(built, Durations.of(built, 1 / v, 2 / v, weight / v))


@pytest.mark.parametrize(("p", "m"), CASES)
def test_bubble_of_gpipe_and_1f1b_is_p_minus_1_of_m_plus_p_minus_1(p: int, m: int) -> None:
    for schedule in (Schedule.GPIPE, Schedule.ONE_F_ONE_B):
        assert run(schedule, p, m).bubble_fraction == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize("v", [2, 3, 4])
@pytest.mark.parametrize(("p", "m"), [*CASES, (4, 9), (4, 6), (3, 11), (8, 13)])
def test_interleaving_divides_the_bubble_by_the_chunks_also_where_p_does_not_divide_m(p: int, m: int, v: int) -> None:
    timeline = run(Schedule.INTERLEAVED, p, m, v)
    assert timeline.idle_s == pytest.approx([(p - 1) * 3 / v] * p)
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (v * m + p - 1))


@pytest.mark.parametrize(("p", "m"), CASES)
def test_zb_h1_has_a_third_of_the_bubble_of_1f1b(p: int, m: int) -> None:
    assert run(Schedule.ZB_H1, p, m).idle_s == pytest.approx([p - 1] * p)


@pytest.mark.parametrize(("p", "m"), CASES)
def test_zbv_is_never_idle_between_its_first_and_last_action(p: int, m: int) -> None:
    timeline = run(Schedule.ZBV, p, m, 2)
    for stage, busy in zip(timeline.stages, timeline.busy_s, strict=True):
        assert stage[-1].end_s - stage[0].start_s == pytest.approx(busy)
    # What is left is the time until a stage's first input arrives.
    assert timeline.idle_s == pytest.approx([(p - 1) / 2] * p)


@pytest.mark.parametrize(("p", "m"), CASES)
def test_dualpipev_bubble_is_f_and_b_plus_b_minus_3w_per_other_stage(p: int, m: int) -> None:
    """DeepSeek's (F&B + B - 3W) per chunk, where a forward and a backward do not overlap: F + 2B - 3W."""
    assert run(Schedule.DUALPIPEV, p, m, 2).idle_s == pytest.approx([(p - 1) * (1 + 2 * 2 - 3 * 1) / 2 / 2] * p)


@pytest.mark.parametrize(("p", "m"), CASES)
def test_peak_activations_are_those_of_the_papers(p: int, m: int) -> None:
    def peaks(schedule: Schedule, v: int = 1) -> tuple[int, ...]:
        return check(build(schedule, p, m, v)).peak_live

    assert peaks(Schedule.GPIPE) == (m,) * p
    assert peaks(Schedule.ONE_F_ONE_B) == tuple(min(m, p - s) for s in range(p))
    assert peaks(Schedule.ZB_H1) == (p,) * p
    assert peaks(Schedule.ZBV, 2) == (2 * p,) * p
    assert peaks(Schedule.DUALPIPEV, 2) == (2 * p + 1,) * p
    if m % p == 0:  # Narayanan et al. 2021, section 2.2.2: (p - s - 1) 2 + (v - 1) p forwards ahead, and one in hand
        v = 3
        assert peaks(Schedule.INTERLEAVED, v) == tuple(min(m * v, 2 * (p - s - 1) + (v - 1) * p + 1) for s in range(p))


def test_1f1b_runs_as_the_paper_draws_it() -> None:
    """Narayanan et al. 2021, figure 4 in small: the second of two stages."""
    built = build(Schedule.ONE_F_ONE_B, 2, 3)
    second = simulate(built, Durations.of(built, 1.0, 2.0)).stages[1]
    assert [(str(t.action), t.start_s, t.end_s) for t in second] == [
        ("F1.0", 1, 2),
        ("B1.0", 2, 4),
        ("F1.1", 4, 5),
        ("B1.1", 5, 7),
        ("F1.2", 7, 8),
        ("B1.2", 8, 10),
    ]


def test_communication_lengthens_the_way_of_a_single_microbatch_by_every_hop() -> None:
    built = build(Schedule.GPIPE, 4, 1)
    assert simulate(built, Durations.of(built, 1.0, 2.0, communication_s=0.5)).makespan_s == pytest.approx(12 + 6 * 0.5)


def test_a_v_turns_on_its_own_stage_without_a_message() -> None:
    built = build(Schedule.ZBV, 2, 1, 2)
    makespan = simulate(built, Durations.of(built, 1.0, 2.0, 1.0, communication_s=10.0)).makespan_s
    # forward 4 chunks, input gradients 4 chunks, 2 weight gradients on the way; 2 + 2 messages, none at the turn
    assert makespan == pytest.approx(4 + 4 + 2 + 40)


def test_a_slow_chunk_sets_the_pace() -> None:
    built = build(Schedule.ONE_F_ONE_B, 2, 10)
    timeline = simulate(built, Durations.of(built, (1.0, 3.0), (2.0, 6.0)))
    assert timeline.makespan_s == pytest.approx(1 + 10 * 9 + 2)
    assert timeline.idle_s == pytest.approx((93 - 30, 3))


def test_messages_do_not_change_the_time_of_the_computation() -> None:
    built = build(Schedule.INTERLEAVED, 3, 7, 2)
    times = Durations.of(built, 1.0, 2.0)
    assert simulate(with_communication(built), times) == simulate(built, times)


def test_a_schedule_that_cannot_finish_is_an_error_and_not_an_endless_loop() -> None:
    built = build(Schedule.GPIPE, 1, 1)
    backwards = type(built)(
        built.schedule, 1, 1, 1, False, False, ((Action(ActionKind.BACKWARD, 0, 0), Action(ActionKind.FORWARD, 0, 0)),)
    )
    with pytest.raises(ValueError, match=r"stages wait at B0\.0"):
        simulate(backwards, Durations.of(built, 1.0, 2.0))


def test_forward_only_schedules_hold_every_forward_and_nothing_else() -> None:
    plain = [(s, 1) for s in (Schedule.GPIPE, Schedule.ONE_F_ONE_B, Schedule.ZB_H1)]
    for schedule, v in (*plain, (Schedule.INTERLEAVED, 2), (Schedule.ZBV, 2), (Schedule.DUALPIPEV, 2)):
        built = build(schedule, 3, 5, v, forward_only=True)
        assert {a.kind for stage in built.actions for a in stage} == {ActionKind.FORWARD}
        assert sum(map(len, built.actions)) == 3 * 5 * v
