"""Verdicts on simulated jobs: the planted culprit is named, whatever it did, wherever it sits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tools.hang_simulation import KINDS, Fault, Job, World, case

from meshwright.doctor.hang import Cause, diagnose_logs
from meshwright.flight.processes import ProcessState
from meshwright.layout.config import HybridParallelConfig

JOB = Job(HybridParallelConfig(dp=4, pp=2, tp=2, global_batch=8))


@pytest.mark.parametrize("kind", KINDS)
def test_the_planted_culprit_is_named(kind: str) -> None:
    said = [case(JOB, kind, seed) for seed in range(6)]
    assert [sentence for right, _, sentence in said if not right] == []


def test_a_job_without_a_fault_is_healthy() -> None:
    world = World(JOB, None)
    world.play()
    assert diagnose_logs(world.logs()).cause is Cause.NOTHING


def test_messages_that_all_have_called_blame_the_link_between_hosts() -> None:
    """Rank 7 waits for a message that rank 3 has sent: neither is late."""
    world = World(Job(HybridParallelConfig(pp=2, tp=1, dp=1, global_batch=1), microbatches=1), Fault("dead", 1, 1))
    world.play()
    logs = [log for log in world.logs() if log.identity.rank in (0, 1)]
    blocked = logs[1].now
    receive = int(logs[1].records["group"][0])
    waits = replace(logs[1], now=replace(blocked, waiting_group=receive, waiting_since_ns=5, peer=0))
    verdict = diagnose_logs([logs[0], waits], dict.fromkeys((0, 1), ProcessState.RUNNING), now_ns=10**10)
    assert verdict.ranks in ((1,), (1, 0))


def test_another_plan_is_named_before_what_follows_from_it() -> None:
    world = World(JOB, Fault("size", 5, 30))
    world.play()
    logs = world.logs()
    logs[9] = replace(logs[9], identity=replace(logs[9].identity, digest="other"))
    verdict = diagnose_logs(logs)
    assert (verdict.cause, verdict.ranks) == (Cause.PLAN, (9,))
