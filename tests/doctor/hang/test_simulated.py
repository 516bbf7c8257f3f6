"""Verdicts on simulated jobs: the planted culprit is named, whatever it did, wherever it sits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tools.hang_simulation import KINDS, Fault, Job, World, case

from meshwright.doctor.hang import Cause, diagnose_logs
from meshwright.doctor.hang.failures import as_noticed
from meshwright.flight import RankLog
from meshwright.flight.incident import Failure
from meshwright.flight.layout import FAILED, SAVING
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


def cut(world: World) -> list[RankLog]:
    """Two hosts whose cable is cut: every rank of a dp group has called its reduction, nothing comes."""
    logs = world.logs()
    found: list[RankLog] = []
    for log in logs:
        host = f"node-{log.identity.coordinates['dp']}"
        group = next(i for i, g in enumerate(log.identity.groups) if g.axis == "dp")
        called = int(np.flatnonzero(log.records["group"] == group)[0])
        now = replace(log.now, waiting_group=group, waiting_since_ns=5, peer=-1, action="B", chunk=0, microbatch=1)
        found.append(
            replace(log, identity=replace(log.identity, host=host), records=log.records[: called + 1], now=now)
        )
    return found


def test_a_cut_cable_is_told_from_the_groups_that_span_it() -> None:
    world = World(Job(HybridParallelConfig(dp=2, tp=2, global_batch=4)), None)
    world.play()
    verdict = diagnose_logs(cut(world), dict.fromkeys(range(4), ProcessState.RUNNING), now_ns=10**10)
    assert (verdict.cause, verdict.ranks, verdict.axis) == (Cause.NETWORK, (0, 2), "dp")
    assert verdict.action == "backward pass of chunk 0, microbatch 1"
    assert verdict.details == ("4 ranks wait for what another host has sent, none waits so inside a host",)


def test_ranks_that_lose_a_peer_when_the_job_is_ended_are_not_the_cause() -> None:
    world = World(Job(HybridParallelConfig(dp=2, tp=2, global_batch=4)), None)
    world.play()
    logs, noticed = cut(world), 10**10
    logs[1] = replace(logs[1], now=replace(logs[1].now, activity=FAILED, updated_ns=noticed + 9))
    lost = Failure(1, noticed + 5, "RuntimeError", "Connection closed by peer", "step")
    states = dict.fromkeys(range(4), ProcessState.RUNNING)
    assert diagnose_logs(logs, states, [lost], noticed).ranks == (1,)
    logs_then, failures_then = as_noticed(logs, [lost], noticed)
    assert diagnose_logs(logs_then, states, failures_then, noticed).cause is Cause.NETWORK


def test_the_rank_whose_files_could_not_be_written_is_named_whoever_reports_it_in_whatever_folder() -> None:
    world = World(JOB, None)
    world.play()
    said = "/data/store/run/checkpoints: step-00000002 cannot be written by rank 6: [Errno 28] No space left on device"
    verdict = diagnose_logs(world.logs(), {}, [Failure(3, 9, "InputError", said, SAVING)])
    assert (verdict.cause, verdict.ranks, verdict.action) == (Cause.FAILED, (6,), "checkpoint")


def test_a_rank_that_failed_and_could_not_say_why_is_named_before_those_that_lost_it() -> None:
    world = World(JOB, None)
    world.play()
    logs = [
        replace(log, now=replace(log.now, activity=FAILED, updated_ns=10 + log.identity.rank)) for log in world.logs()
    ]
    lost = [Failure(rank, 5, "RuntimeError", "Connection reset by peer", "step") for rank in range(16) if rank != 9]
    verdict = diagnose_logs(logs, {}, lost)
    assert (verdict.cause, verdict.ranks) == (Cause.FAILED, (9,))
    assert "could not write its error down" in verdict.sentence
