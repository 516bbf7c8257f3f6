"""Closed forms equal the schedules themselves: bubble by simulation, live activations by counting."""

from __future__ import annotations

import random

import numpy as np
import pytest

from meshwright.layout.config import Schedule
from meshwright.schedules import (
    Durations,
    bubble_fraction,
    bubble_microbatches,
    build,
    check,
    is_v_shaped,
    live_microbatches,
    simulate,
)

CODES = {schedule: code for code, schedule in enumerate(Schedule)}
STAGES = (1, 2, 3, 4, 6, 8)


def chunk_choices(schedule: Schedule) -> tuple[int, ...]:
    if is_v_shaped(schedule):
        return (2,)
    return (2, 3, 5) if schedule is Schedule.INTERLEAVED else (1,)


def grid(schedule: Schedule) -> list[tuple[int, int, int]]:
    """(stages, microbatches, chunks)."""
    return [(p, m, v) for p in STAGES for v in chunk_choices(schedule) for m in range(1, 3 * p + 2)]


@pytest.mark.parametrize("schedule", list(Schedule))
def test_live_microbatches_equal_the_count_over_the_schedule(schedule: Schedule) -> None:
    for p, m, v in grid(schedule):
        counted = np.array(check(build(schedule, p, m, v)).peak_live) / v
        np.testing.assert_allclose(
            live_microbatches(CODES[schedule], p, m, v, np.arange(p)), counted, err_msg=f"{p, m}"
        )


@pytest.mark.parametrize("schedule", list(Schedule))
def test_bubble_equals_the_simulated_idle_time(schedule: Schedule) -> None:
    draw = random.Random(7)
    for p, m, v in grid(schedule):
        built = build(schedule, p, m, v)
        for _ in range(3):
            forward, inputs, weight = 1.0, draw.uniform(1.0, 2.5), draw.uniform(0.3, 1.2)
            step = m * (forward + inputs + weight)
            times = Durations.of(built, forward / v, (inputs + weight) / v, weight / v)
            idle = simulate(built, times).makespan_s - step
            closed = float(bubble_microbatches(CODES[schedule], p, m, v, forward, inputs + weight, weight))
            exact = schedule is not Schedule.ZBV or m <= p + 1 or m >= 2 * p
            assert closed == pytest.approx(idle, abs=1e-9 if exact else 0.02 * step), (p, m, v, inputs, weight)


def test_closed_forms_broadcast_over_mixed_arrays_as_they_do_one_by_one() -> None:
    code = np.array([CODES[s] for s in Schedule] * 3)
    p = np.repeat([1, 4, 8], len(Schedule))
    m = np.array([8, 3, 9] * len(Schedule))
    v = np.where(code == CODES[Schedule.INTERLEAVED], 3, np.where(code >= CODES[Schedule.ZBV], 2, 1))
    bubble = bubble_microbatches(code, p, m, v, 1.0, 2.5, 1.0)
    live = live_microbatches(code, p, m, v, p - 1)
    for i in range(len(code)):
        assert bubble[i] == float(bubble_microbatches(code[i], p[i], m[i], v[i], 1.0, 2.5, 1.0))
        assert live[i] == float(live_microbatches(code[i], p[i], m[i], v[i], p[i] - 1))


@pytest.mark.parametrize(("p", "m"), [(2, 2), (4, 16), (8, 8), (6, 64)])
def test_bubble_fraction_of_1f1b_is_that_of_the_paper(p: int, m: int) -> None:
    for schedule in (Schedule.GPIPE, Schedule.ONE_F_ONE_B):
        assert float(bubble_fraction(CODES[schedule], p, m, 1)) == pytest.approx((p - 1) / (m + p - 1))
