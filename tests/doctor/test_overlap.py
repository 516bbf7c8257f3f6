"""Recorded timelines put side by side: when a call could travel, and how much of that its rank did something else."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.doctor.overlap import axis_overlap, length, matched, union
from meshwright.measurements import RankTimeline, TimedCall

PAIR = (0, 1)


def call(issued_s: float, ended_s: float | None, *waits: tuple[float, float], **changes: Any) -> TimedCall:
    given: dict[str, Any] = {"axis": "dp", "ranks": PAIR, "collective": "all_reduce", "phase": "backward"}
    given |= {"what": "gradients", "call_bytes": 8, "peer": -1} | changes
    return TimedCall(issued_s=issued_s, ended_s=ended_s, waits=waits, **given)


def timelines(*calls: list[TimedCall]) -> list[RankTimeline]:
    return [RankTimeline(rank, 0, 3, 0.0, 10.0, (), tuple(own)) for rank, own in enumerate(calls)]


def test_a_collective_is_in_flight_once_its_last_rank_has_come():
    blocking, late = call(1.0, 5.0, (1.0, 5.0)), call(4.0, 5.0, (4.0, 5.0))
    (axis,) = axis_overlap(timelines([blocking], [late]))
    assert (axis.in_flight_s, axis.exposed_s, axis.late_s) == (1.0, 1.0, 1.5)
    assert axis.hidden == 0.0


def test_what_is_waited_for_at_its_end_only_is_hidden_by_the_rest():
    (axis,) = axis_overlap(timelines([call(1.0, 5.0, (1.0, 1.0), (4.0, 5.0))], [call(1.0, 5.0, (4.0, 5.0))]))
    assert axis.hidden == pytest.approx(0.75)


def test_calls_of_a_group_meet_in_the_order_in_which_each_rank_issues_them():
    first, second = matched(timelines([call(1.0, 2.0), call(3.0, 4.0)], [call(1.5, 2.0), call(3.5, 4.0)]))[:2]
    assert (first.met_s, second.met_s) == (1.5, 3.5)


def test_a_message_ends_when_its_receiver_has_it_though_the_sender_looks_later():
    sent = call(1.0, 9.0, (9.0, 9.5), axis="pp", collective="send", peer=1)
    received = call(2.0, 3.0, (2.5, 3.0), axis="pp", collective="receive", peer=0)
    for m in matched(timelines([sent], [received])):
        assert (m.met_s, m.end_s) == (2.0, 3.0)


def test_both_directions_of_a_pair_are_told_apart():
    def rank(peer: int, at: float) -> list[TimedCall]:
        sends = call(at, None, axis="pp", collective="send", peer=peer)
        return [sends, call(at, at + 2.0, axis="pp", collective="receive", peer=peer)]

    ends = {(m.rank, m.call.collective): m.end_s for m in matched(timelines(rank(1, 1.0), rank(0, 2.0)))}
    assert ends == {(0, "send"): 4.0, (0, "receive"): 3.0, (1, "send"): 3.0, (1, "receive"): 4.0}


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda p: (min(p), max(p)))))
def test_the_length_of_intervals_counts_every_moment_once(intervals: list[tuple[int, int]]):
    covered = {moment for start, end in intervals for moment in range(start, end)}
    assert length(intervals) == len(covered)
    merged = union(intervals)
    assert all(before[1] < after[0] for before, after in pairwise(merged))
