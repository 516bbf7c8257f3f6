"""Flight logs of a job of any size with one planted culprit, made by playing its programs against one another.

Every rank of dp x pp x tp gets the list of calls that a GPipe step makes (messages over pp, collectives of every layer
over tp, gradients over dp, the loss over pp); ranks run until nobody can go on. What each has called by then is its
log.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from meshwright.doctor.hang import Cause, diagnose_logs
from meshwright.flight import Group, Identity, RankLog
from meshwright.flight.layout import COLLECTIVES, PHASES, RECORD, STEP
from meshwright.flight.processes import ProcessState
from meshwright.flight.reader import Now
from meshwright.layout.config import HybridParallelConfig
from meshwright.layout.grid import rank_layout
from meshwright.ledger import Collective, Phase

CALL_NS, LIMIT_NS = 1_000_000, 60_000_000_000
KINDS = {
    "skipped": (Cause.SKIPPED, Cause.ORDER),  # which of the two cannot be known of a rank that blocks in the wrong call
    "order": (Cause.ORDER,),
    "size": (Cause.SIZE,),
    "dtype": (Cause.DTYPE,),
    "dead": (Cause.DEAD,),
    "stopped": (Cause.STOPPED,),
    "sleeping": (Cause.WAITED_FOR,),
    "missing": (Cause.MISSING,),
}
"""Faults that can be planted, and the verdicts that are right for each."""


@dataclass(frozen=True)
class Call:
    """One call of a rank's program. `peer` -1: a collective of the axis' group."""

    axis: str
    collective: Collective
    phase: Phase
    what: str
    call_bytes: int
    action: str
    chunk: int
    microbatch: int
    dtype: str = "bfloat16"
    peer: int = -1


@dataclass(frozen=True)
class Job:
    """A mesh and the size of its programs."""

    config: HybridParallelConfig
    layers: int = 2
    microbatches: int = 2
    steps: int = 3


@dataclass(frozen=True)
class Fault:
    """What goes wrong on which rank, at which of its calls."""

    kind: str
    rank: int
    at: int


def program(job: Job, stage: int, peers: tuple[int, int]) -> Iterator[Call]:
    """One step of a stage. `peers`: global ranks of the stages before and after (-1: none)."""
    before, after = peers
    message, reduced = 1 << 20, 2 << 20
    for m in range(job.microbatches):
        if before >= 0:
            yield Call("pp", Collective.RECEIVE, Phase.FORWARD, "stage input", message, "RF", stage, m, peer=before)
        for _ in range(job.layers):
            for what in ("attention output", "mlp output"):
                yield Call("tp", Collective.ALL_REDUCE, Phase.FORWARD, what, reduced, "F", stage, m)
        if after >= 0:
            yield Call("pp", Collective.SEND, Phase.FORWARD, "stage output", message, "SF", stage, m, peer=after)
    for m in range(job.microbatches):
        if after >= 0:
            yield Call("pp", Collective.RECEIVE, Phase.BACKWARD, "output gradient", message, "RB", stage, m, peer=after)
        for _ in range(job.layers):
            for what in ("mlp input", "attention input"):
                yield Call("tp", Collective.ALL_REDUCE, Phase.BACKWARD, what, reduced, "B", stage, m)
        if before >= 0:
            yield Call("pp", Collective.SEND, Phase.BACKWARD, "input gradient", message, "SB", stage, m, peer=before)
    yield Call("dp", Collective.ALL_REDUCE, Phase.BACKWARD, "layer gradients", 8 << 20, "", -1, -1)
    yield Call("dp", Collective.ALL_REDUCE, Phase.BACKWARD, "ends gradients", 4 << 20, "", -1, -1)
    yield Call("dp", Collective.ALL_REDUCE, Phase.FORWARD, "loss and token count", 16, "", -1, -1, "float64")


class World:
    """Ranks that play their programs until nobody can go on."""

    def __init__(self, job: Job, fault: Fault | None) -> None:
        self.job, self.fault = job, fault
        self.layout = rank_layout(job.config)
        self.world = job.config.world_size
        self.groups: dict[str, dict[int, tuple[int, ...]]] = {"pp": {}, "tp": {}, "dp": {}}
        for axis, of in self.groups.items():
            for members in self.layout.groups(axis).tolist():
                of.update(dict.fromkeys(members, tuple(members)))
        self.coordinates = self.layout.coordinates(np.arange(self.world))
        self.programs = {rank: self._program(rank) for rank in range(self.world)}
        self.made: dict[int, list[Call]] = {rank: [] for rank in range(self.world)}
        self.blocked: dict[int, Call] = {}

    def _program(self, rank: int) -> list[tuple[int, Call]]:
        stage = int(self.coordinates["pp"][rank])
        row = self.groups["pp"][rank]
        peers = (row[stage - 1] if stage else -1, row[stage + 1] if stage + 1 < len(row) else -1)
        # groups of one rank call nothing, as in the runtime
        once = [call for call in program(self.job, stage, peers) if len(self.groups[call.axis][rank]) > 1]
        calls = [(step, call) for step in range(self.job.steps) for call in once]
        return self._with_fault(calls) if self.fault and self.fault.rank == rank else calls

    def _with_fault(self, calls: list[tuple[int, Call]]) -> list[tuple[int, Call]]:
        assert self.fault is not None
        at, kind = self.fault.at, self.fault.kind
        step, call = calls[at]
        if kind == "skipped":
            return calls[:at] + calls[at + 1 :]
        if kind == "order":
            return [*calls[:at], calls[at + 1], calls[at], *calls[at + 2 :]]
        if kind in ("size", "dtype"):
            changes = {"call_bytes": call.call_bytes // 2} if kind == "size" else {"dtype": "float16"}
            wrong = Call(**(vars(call) | changes))
            return [*calls[:at], (step, wrong), *calls[at + 1 :]]
        return calls[:at]  # dead, stopped, sleeping: nothing after it

    def play(self) -> None:
        """Event by event: a collective ends when all members have made the same call, a receive when the message is
        there; sends never wait."""
        arrived: dict[tuple[tuple[int, ...], int], list[tuple[int, Call]]] = defaultdict(list)
        counts: dict[tuple[str, int], int] = defaultdict(int)
        sent: dict[tuple[int, int], int] = defaultdict(int)
        received: dict[tuple[int, int], int] = defaultdict(int)
        receivers: dict[tuple[int, int], int] = {}
        place = dict.fromkeys(self.programs, 0)
        ready = deque(r for r in self.programs if not (self._absent(r)))
        while ready:
            rank = ready.popleft()
            self.blocked.pop(rank, None)
            while place[rank] < len(self.programs[rank]):
                _, call = self.programs[rank][place[rank]]
                place[rank] += 1
                self.made[rank].append(call)
                if call.collective is Collective.SEND:
                    key = (rank, call.peer)
                    sent[key] += 1
                    if key in receivers:
                        ready.append(receivers.pop(key))
                    continue
                if call.collective is Collective.RECEIVE:
                    key = (call.peer, rank)
                    received[key] += 1
                    if sent[key] >= received[key]:
                        continue
                    receivers[key] = rank
                    self.blocked[rank] = call
                    break
                members = self.groups[call.axis][rank]
                counts[(call.axis, rank)] += 1
                here = arrived[(members, counts[(call.axis, rank)])]
                here.append((rank, call))
                if len(here) == len(members) and len({c for _, c in here}) == 1:
                    ready.extend(r for r, _ in here if r != rank)
                    continue
                self.blocked[rank] = call
                break

    def _absent(self, rank: int) -> bool:
        return self.fault is not None and self.fault.rank == rank and self.fault.kind == "missing"

    def logs(self) -> list[RankLog]:
        """What the ranks' flight logs hold when nobody goes on."""
        return [self._log(rank) for rank in self.programs if not self._absent(rank)]

    def _log(self, rank: int) -> RankLog:
        axes = ("pp", "tp", "dp")
        groups = tuple(Group(axis, self.groups[axis][rank]) for axis in axes)
        identity = Identity(
            rank,
            self.world,
            {axis: int(values[rank]) for axis, values in self.coordinates.items()},
            f"node-{rank // 8}",
            1000 + rank,
            1,
            "boot",
            "digest",
            0,
            groups,
        )
        made, steps = self.made[rank], [step for step, _ in self.programs[rank]]
        records = np.zeros(len(made), RECORD)
        sequences: dict[tuple[str, int, bool], int] = defaultdict(int)
        for i, call in enumerate(made):
            key = (call.axis, call.peer, call.collective is Collective.SEND)
            sequences[key] += 1
            records[i] = (
                *(i + 1, sequences[key], i * CALL_NS, (i + 1) * CALL_NS, call.call_bytes, steps[i]),
                *(axes.index(call.axis), COLLECTIVES.index(call.collective), PHASES.index(call.phase)),
                *(call.microbatch, call.chunk, call.peer, call.action.encode(), call.dtype.encode()),
                *(call.what.encode(), i + 1),
            )
        waits = self.blocked.get(rank)
        last = made[-1] if made else None
        now = Now(
            len(made) * CALL_NS,
            steps[len(made) - 1] if made else 0,
            last.chunk if last else -1,
            last.microbatch if last else -1,
            -1 if waits is None else axes.index(waits.axis),
            0 if waits is None else len(made) * CALL_NS,
            -1 if waits is None else waits.peer,
            "step",
            last.action if last else "",
        )
        return RankLog(identity, now, records, np.empty(0, STEP))


def planted(job: Job, kind: str, draw: random.Random) -> Fault:
    """A fault of a kind at a random rank and a random call of the second step (collectives only where it is about one;
    a swap is of two different calls of one axis)."""
    whole = World(job, None)
    rank = draw.randrange(whole.world)
    calls = whole.programs[rank]
    second = [i for i, (step, _) in enumerate(calls) if step == 1]
    if kind in ("skipped", "size", "dtype"):
        second = [i for i in second if calls[i][1].peer < 0]
    if kind == "order":
        second = [i for i in second[:-1] if calls[i][1].axis == calls[i + 1][1].axis and calls[i][1].peer < 0]
        second = [i for i in second if calls[i + 1][1].peer < 0 and calls[i][1] != calls[i + 1][1]]
    return Fault(kind, rank, draw.choice(second))


def case(job: Job, kind: str, seed: int) -> tuple[bool, float, str]:
    """One planted culprit: whether the verdict names it, how long the analysis took, what it said."""
    fault = planted(job, kind, random.Random(seed))
    world = World(job, fault)
    world.play()
    logs = world.logs()
    states = {log.identity.rank: ProcessState.RUNNING for log in logs}
    if kind in ("dead", "stopped"):
        states[fault.rank] = ProcessState.GONE if kind == "dead" else ProcessState.STOPPED
    started = time.perf_counter()
    verdict = diagnose_logs(logs, states, now_ns=LIMIT_NS)
    took = time.perf_counter() - started
    right = verdict.cause in KINDS[kind] and verdict.ranks == (fault.rank,)
    return right, took, verdict.sentence


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first case: a long run in parts")
    parser.add_argument("--dp", type=int, default=64)
    parser.add_argument("--pp", type=int, default=8)
    parser.add_argument("--tp", type=int, default=8)
    arguments = parser.parse_args()
    sizes = {"dp": arguments.dp, "pp": arguments.pp, "tp": arguments.tp}
    job = Job(HybridParallelConfig(**sizes, global_batch=2 * arguments.dp))
    right, slowest = 0, 0.0
    for i in range(arguments.first, arguments.first + arguments.cases):
        kind = list(KINDS)[i % len(KINDS)]
        found, took, said = case(job, kind, seed=i)
        right, slowest = right + found, max(slowest, took)
        if not found:
            print(f"case {i} ({kind}): {said}")
    world = job.config.world_size
    print(f"{right} of {arguments.cases} culprits named among {world:,} ranks, slowest analysis {slowest:.1f} s")
    return 0 if right == arguments.cases else 1


if __name__ == "__main__":
    sys.exit(main())
