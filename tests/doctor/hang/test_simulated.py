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


def test_a_message_that_was_sent_and_does_not_arrive_blames_the_link_between_the_hosts() -> None:
    """Rank 1 waits for what rank 0 has sent: nobody is late."""
    world = World(Job(HybridParallelConfig(pp=2, global_batch=1), microbatches=1), None)
    world.play()
    sender, receiver = world.logs()
    arrived = receiver.records[:1]  # the receive of the first microbatch is all that it has called
    waits = replace(receiver.now, waiting_group=int(arrived["group"][0]), waiting_since_ns=5, peer=0)
    away = replace(receiver.identity, host="node-1")
    verdict = diagnose_logs(
        [sender, replace(receiver, identity=away, records=arrived, now=waits)],
        dict.fromkeys((0, 1), ProcessState.RUNNING),
        now_ns=10**10,
    )
    assert (verdict.cause, verdict.ranks, verdict.axis) == (Cause.NETWORK, (1, 0), "pp")
    assert "nothing arrives between node-0 and node-1" in verdict.sentence


def test_another_plan_is_named_before_what_follows_from_it() -> None:
    world = World(JOB, Fault("size", 5, 30))
    world.play()
    logs = world.logs()
    logs[9] = replace(logs[9], identity=replace(logs[9].identity, digest="other"))
    verdict = diagnose_logs(logs)
    assert (verdict.cause, verdict.ranks) == (Cause.PLAN, (9,))
