"""The check before a job starts: does every rank come, run the same thing, and reach the others in every group?

In: the store of the rendezvous (it works before any group exists), what this rank is, and the plan's layout. Out: one
line where all is well, or an InputError that names ranks and hosts. Every wait is bounded: ranks post to the store how
far they got, so that the one that does not come is known by name.
"""

from __future__ import annotations

import json
import platform
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig
from meshwright.layout.grid import rank_layout
from meshwright.plan import Plan
from meshwright.runtime.launch import Device, host_name
from meshwright.runtime.process_groups import LAYOUT_GROUPS, ProcessGroupManager
from meshwright.runtime.start_store import store_of_this_start

LIMIT_S = 60.0
MOST_SKEW_S = 2.0
"""Clocks further apart than this make logs of several hosts unreadable together."""
MOST_NAMED = 8
"""Ranks that a line names before it says how many more there are."""
STAGES = ("join the world", "make its groups", *(f"reach the others in group {name}" for name in LAYOUT_GROUPS))
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
SAME = {
    "digest": "a plan",
    "python": "Python",
    "torch": "torch",
    "transformers": "transformers",
    "meshwright": "meshwright",
}


class StuckError(InputError):
    """A thread of this process still waits in a group and cannot be called back: leave with os._exit."""


@dataclass(frozen=True)
class Facts:
    """What a rank says of itself. `ports`: the lowest and highest that its kernel gives away, none where unknown."""

    host: str
    digest: str
    python: str
    torch: str
    transformers: str
    meshwright: str
    device: str
    free_bytes: int
    ports: tuple[int, int] | None


@dataclass(frozen=True)
class Needs:
    """`rank_bytes`: memory that the fullest rank is predicted to need (0: unknown). `limit_s`: of each wait.
    `master_port`: torchrun's."""

    rank_bytes: int = 0
    limit_s: float = LIMIT_S
    master_port: int | None = None


def facts_here(digest: str, device: Device) -> Facts:
    """This rank as it is."""
    return Facts(
        host=host_name(),
        digest=digest,
        python=platform.python_version(),
        torch=str(torch.__version__),
        transformers=version("transformers"),
        meshwright=version("meshwright"),
        device=device.type,
        free_bytes=_free_bytes(device),
        ports=_port_range(),
    )


def env_store(limit_s: float) -> Store:
    """The store that torchrun's environment names, for this start of the job, before the world is joined."""
    store, rank, world = next(iter(rendezvous("env://", timeout=timedelta(seconds=limit_s))))
    return store_of_this_start(store, rank, world, limit_s)


class Preflight:
    """One rank's part. Call `compare`, then `reach`, on all ranks; `summary` is the line of success."""

    def __init__(
        self, store: Store, rank: int, world: int, needs: Needs, clock: Callable[[], float] = time.time
    ) -> None:
        self.rank, self.world, self.needs, self.clock = rank, world, needs, clock
        self._store = PrefixStore("meshwright/preflight", store)
        self._limit = timedelta(seconds=needs.limit_s)
        self.facts: list[Facts] = []
        self.skew_s = 0.0

    def compare(self, own: Facts, config: HybridParallelConfig) -> None:
        """All ranks come, and are alike."""
        self.facts = [_facts_from(text) for text in self._exchanged("facts", json.dumps(asdict(own)))]
        clocks = self._clocks()
        middle = sorted(clocks)[len(clocks) // 2]
        self.skew_s = max(clocks) - min(clocks)
        problems = [
            *_differing(self.facts),
            *(
                f"the clock of {self._named([r])} is {abs(t - middle):.1f} s {'ahead' if t > middle else 'behind'}"
                for r, t in enumerate(clocks)
                if abs(t - middle) > MOST_SKEW_S
            ),
            *_without_room(self.facts, self.needs.rank_bytes),
            *_without_ports(self.facts, _connections(config)),
        ]
        if problems:
            raise InputError(f"preflight: {'; '.join(problems)}")

    def reach(self, config: HybridParallelConfig, device: Device, join: Callable[[], None] | None = None) -> None:
        """Join the world (where it is not joined yet), make every group of the plan and reduce one number in each."""
        posting = _clone(self._store)  # a thread that waits in a store keeps it
        failed: list[Exception] = []

        def work() -> None:
            try:
                if device.index is not None:
                    torch.cuda.set_device(device.index)
                posting.set(f"at/{self.rank}", "0")
                if join is not None:
                    join()
                posting.set(f"at/{self.rank}", "1")
                _reduce_in_every_group(config, device, lambda done: posting.set(f"at/{self.rank}", str(done)))
            except Exception as error:  # raised by the thread that waits
                failed.append(error)

        thread = threading.Thread(target=work, daemon=True, name="preflight")
        thread.start()
        thread.join(self.needs.limit_s)
        if thread.is_alive():
            raise StuckError(self._who_is_behind(_clone(self._store)))
        if failed and isinstance(failed[0], RuntimeError):
            reason = (str(failed[0]).strip().splitlines() or ["no reason given"])[0][:200]
            raise StuckError(f"preflight: {self._named([self.rank])} cannot reach the others: {reason}")
        if failed:
            raise failed[0]

    def summary(self) -> str:
        hosts = len({fact.host for fact in self.facts})
        free = min(fact.free_bytes for fact in self.facts) / 2**30
        line = (
            f"preflight: {self.world} ranks on {hosts} {'host' if hosts == 1 else 'hosts'} reach each other in every "
            f"group; one plan, same versions; clocks within {self.skew_s:.2f} s; at least {free:.1f} GiB free"
        )
        port, ports = self.needs.master_port, self.facts[0].ports
        if port is None or ports is None:
            return line
        place = "inside" if ports[0] <= port <= ports[1] else "outside"
        return f"{line}; master port {port} is {place} the kernel's own range {ports[0]} to {ports[1]}"

    def _clocks(self) -> list[float]:
        """All ranks' clocks, read as soon as rank 0, which has seen all, says so."""
        if self.rank == 0:
            self._store.set("go", "1")
        self._wait(["go"], lambda: "rank 0 did not go on")
        return [float(text) for text in self._exchanged("clock", repr(self.clock()))]

    def _exchanged(self, what: str, own: str) -> list[str]:
        """What every rank posted, in rank order."""
        self._store.set(f"{what}/{self.rank}", own)
        keys = [f"{what}/{rank}" for rank in range(self.world)]

        def missing() -> str:
            ranks = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            return f"{self._named(ranks)} did not come within {self.needs.limit_s:g} s"

        self._wait(keys, missing)
        return [self._store.get(key).decode() for key in keys]

    def _wait(self, keys: list[str], problem: Callable[[], str]) -> None:
        try:
            self._store.wait(keys, self._limit)
        except dist.DistStoreError:
            raise InputError(f"preflight: {problem()}") from None

    def _who_is_behind(self, store: Store) -> str:
        """The ranks that got least far, and what they did not get through."""
        keys = [f"at/{rank}" for rank in range(self.world)]
        at = [int(store.get(key)) if store.check([key]) else -1 for key in keys]
        least = min(at)
        ranks = self._named([rank for rank, done in enumerate(at) if done == least])
        what = "start to join" if least < 0 else STAGES[min(least, len(STAGES) - 1)]
        return f"preflight: {ranks} did not {what} within {self.needs.limit_s:g} s"

    def _named(self, ranks: list[int]) -> str:
        return named(ranks, self.facts)


def check_start(
    plan: Plan, needs: Needs, device: Device, store: Store, rank: int, join: Callable[[], None] | None = None
) -> None:
    """The start-up check of one rank, which joins the world by `join` where it has not yet; rank 0 says it is well."""
    flight = Preflight(store, rank, plan.parallel.world_size, needs)
    flight.compare(facts_here(plan.digest(), device), plan.parallel)
    flight.reach(plan.parallel, device, join)
    if rank == 0:
        print(flight.summary(), file=sys.stderr)


def named(ranks: list[int], facts: list[Facts]) -> str:
    """'rank 3 (node-2)', 'ranks 3, 5 (node-2, node-4)'; a rank that said nothing has no host that is known."""
    numbers = ", ".join(str(rank) for rank in ranks[:MOST_NAMED])
    more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    hosts = ", ".join(sorted({facts[rank].host for rank in ranks})[:MOST_NAMED]) if facts else "host unknown"
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers}{more} ({hosts})"


def _reduce_in_every_group(config: HybridParallelConfig, device: Device, done: Callable[[int], None]) -> None:
    """`done` is told how many of STAGES are behind this rank."""
    groups = ProcessGroupManager(config, device)
    done(2)
    for place, name in enumerate(LAYOUT_GROUPS):
        if name in groups.axes:  # a middle stage has no embedding group
            axis = groups.axis(name)
            one = torch.ones(1, device=device.torch)
            dist.all_reduce(one, group=axis.group)
            if int(one) != axis.size:
                raise RuntimeError(f"group {name} of {axis.size} ranks added up to {int(one)}")
        done(place + 3)
    groups.close()


def _differing(facts: list[Facts]) -> Iterable[str]:
    """A line for every value that some ranks do not share with the most."""
    for field, words in SAME.items():
        values = [str(getattr(fact, field)) for fact in facts]
        common = Counter(values).most_common(1)[0][0]  # of equals the first met: rank 0's
        for other in sorted(set(values) - {common}):
            ranks = [rank for rank, value in enumerate(values) if value == other]
            who = f"{named(ranks, facts)} {'have' if len(ranks) > 1 else 'has'}"
            if field == "digest":
                yield f"{who} a plan that differs from the others'"
            else:
                yield f"{who} {words} {other}, the others {common}"


def _without_room(facts: list[Facts], rank_bytes: int) -> Iterable[str]:
    """Hosts (CPU: their ranks share memory) or GPUs with less free than is needed."""
    on_host = Counter(fact.host for fact in facts)
    for rank, fact in enumerate(facts):
        sharing = on_host[fact.host] if fact.device == "cpu" else 1
        first = fact.device != "cpu" or all(before.host != fact.host for before in facts[:rank])
        if first and fact.free_bytes < sharing * rank_bytes:
            free, needed = fact.free_bytes / 2**30, sharing * rank_bytes / 2**30
            yield f"{named([rank], facts)} has {free:.1f} GiB free where {needed:.1f} are needed"


def _without_ports(facts: list[Facts], each: int) -> Iterable[str]:
    """Hosts whose kernel has fewer ports to give away than their ranks will open connections."""
    on_host = Counter(fact.host for fact in facts)
    for host, ranks in on_host.items():
        first = next(rank for rank, fact in enumerate(facts) if fact.host == host)
        ports = facts[first].ports
        if ports is not None and ports[1] - ports[0] + 1 < ranks * each:
            yield (
                f"{named([first], facts)} may use ports {ports[0]} to {ports[1]}, its {ranks} ranks need "
                f"{ranks * each}: widen net.ipv4.ip_local_port_range"
            )


def _connections(config: HybridParallelConfig) -> int:
    """Connections of one rank: one to every other member of every group, and to the store."""
    layout = rank_layout(config)
    return 1 + config.world_size + sum(int(layout.groups(name).shape[1]) for name in LAYOUT_GROUPS)


def _free_bytes(device: Device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device.index)[0])
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise InputError("preflight: /proc/meminfo does not say how much memory is available; it needs Linux")


def _port_range() -> tuple[int, int] | None:
    if not PORT_RANGE.is_file():
        return None
    low, high = PORT_RANGE.read_text("ascii").split()
    return int(low), int(high)


def _facts_from(text: str) -> Facts:
    values = json.loads(text)
    ports = values.pop("ports")
    return Facts(**values, ports=None if ports is None else (int(ports[0]), int(ports[1])))


def _clone(store: Store) -> Store:
    return store.clone()  # pyright: ignore[reportAttributeAccessIssue]  (missing in torch's stubs)
