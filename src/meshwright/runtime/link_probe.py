"""Measure the links of a job on its own groups: every collective of every axis by size, and all pairs on request.

In: the groups of a joined world. Out: `LinkSamples` on every rank. All groups of an axis run at the same time, as they
do in a step; pairs run by themselves (or, in large worlds, in rounds of pairs that share no rank).
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.layout.config import HybridParallelConfig
from meshwright.ledger import Collective
from meshwright.measurements import LinkSample, LinkSamples
from meshwright.runtime.launch import Device, run_ranks
from meshwright.runtime.process_groups import ProcessGroupManager

SIZES = (4, 16 * 2**10, 256 * 2**10, 4 * 2**20)
"""Bytes of a call: latency, what toys send, what models send."""
PAIR_SIZES = (4, 1 * 2**20)
AXES = ("tp", "cp", "pp", "dp", "ep")
COLLECTIVES = (
    Collective.ALL_REDUCE,
    Collective.ALL_GATHER,
    Collective.REDUCE_SCATTER,
    Collective.ALL_TO_ALL,
    Collective.BROADCAST,
    Collective.SEND,
)
MOST_SINGLE_PAIRS = 16  # ranks up to which every pair has the machine to itself
REPEATS, QUIET_SHARE, LIMIT_S = 9, 0.25, 600.0
COMPUTED, PRODUCTS_BETWEEN = 256, 3
"""About a millisecond of a core: what a layer of a small model computes between two calls."""


def measure_links(
    groups: ProcessGroupManager, sizes: Sequence[int] = SIZES, pairs: bool = False, host: str | None = None
) -> LinkSamples:
    """All axes of more than one rank. Call it on every rank; `host` is this rank's machine."""
    world = dist.get_world_size()
    hosts: list[str] = [""] * world
    dist.all_gather_object(hosts, host or platform.node())
    own: list[tuple[str, str, tuple[int, ...], int, float]] = []
    for axis in (a for a in AXES if a in groups.axes and groups.axis(a).size > 1):
        group = groups.axis(axis)
        for collective in COLLECTIVES:
            for size in sizes:
                dist.barrier()
                call = _call(collective, group.group, group.ranks, group.rank, size, groups.device.torch)
                own.append((axis, collective.value, group.ranks, size, _seconds(call, groups.device.torch)))
    if pairs:
        own += _pairs(groups.device.torch)
    found: list[list[Any]] = [[] for _ in range(world)]
    dist.all_gather_object(found, own)
    return LinkSamples(tuple(hosts), _joined(found, hosts), f"torch {torch.__version__}, {dist.get_backend()}")


def measure_links_forked(config: HybridParallelConfig, pairs: bool, sizes: Sequence[int] = SIZES) -> LinkSamples:
    """The same on ranks forked on this machine."""
    found: list[LinkSamples] = run_ranks(config.world_size, _forked, config, pairs, tuple(sizes), timeout_s=LIMIT_S)
    return found[0]


def _forked(config: HybridParallelConfig, pairs: bool, sizes: tuple[int, ...]) -> LinkSamples:
    return measure_links(ProcessGroupManager(config, Device("cpu", "gloo")), sizes, pairs)


def _joined(found: list[list[Any]], hosts: list[str]) -> tuple[LinkSample, ...]:
    """A call is done when its last rank is: the slowest member counts."""
    slowest: dict[tuple[str, str, tuple[int, ...], int], float] = {}
    for rows in found:
        for axis, collective, ranks, size, seconds in rows:
            key = (axis, collective, ranks, size)
            slowest[key] = max(seconds, slowest.get(key, 0.0))
    return tuple(
        LinkSample(axis, collective, ranks, tuple(sorted({hosts[r] for r in ranks})), size, seconds)
        for (axis, collective, ranks, size), seconds in sorted(slowest.items())
    )


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call in the quietest quarter of its repetitions; on a GPU until the device has done it. On a CPU
    ranks compute between the calls, as in a step: the threads that send have gone to sleep by then, and waking them
    takes longer than sending a few kilobytes."""
    times: list[float] = []
    left = torch.ones(COMPUTED, COMPUTED)
    for _ in range(REPEATS + 1):
        if device.type == "cpu":
            for _ in range(PRODUCTS_BETWEEN):
                torch.mm(left, left)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return max(sorted(times[1:])[int(QUIET_SHARE * REPEATS)], 1e-9)


def _call(
    collective: Collective,
    group: dist.ProcessGroup,
    ranks: tuple[int, ...],
    own: int,
    size: int,
    device: torch.device,
) -> Callable[[], Any]:
    """One call whose larger buffer has `size` bytes (at least an element for each rank)."""
    n = len(ranks)
    part = max(1, size // 4 // n)
    whole, piece = torch.ones(part * n, device=device), torch.ones(part, device=device)
    calls: dict[Collective, Callable[[], Any]] = {
        Collective.ALL_REDUCE: lambda: dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=group),
        Collective.ALL_GATHER: lambda: dist.all_gather_single(whole, piece, group=group),
        Collective.REDUCE_SCATTER: lambda: dist.reduce_scatter_single(piece, whole, group=group),
        Collective.ALL_TO_ALL: lambda: dist.all_to_all_single(torch.empty_like(whole), whole, group=group),
        Collective.BROADCAST: lambda: dist.broadcast(whole, src=ranks[0], group=group),
        Collective.SEND: lambda: _around(whole, ranks, own, group),
    }
    return calls[collective]


def _around(tensor: Tensor, ranks: tuple[int, ...], own: int, group: dist.ProcessGroup) -> None:
    """Every rank sends to the next and receives from the one before."""
    received = torch.empty_like(tensor)
    operations = [
        dist.P2POp(dist.isend, tensor, ranks[(own + 1) % len(ranks)], group),
        dist.P2POp(dist.irecv, received, ranks[own - 1], group),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _pairs(device: torch.device) -> list[tuple[str, str, tuple[int, ...], int, float]]:
    """Every two ranks: a message there and back, halved."""
    world, me = dist.get_world_size(), dist.get_rank()
    found: list[tuple[str, str, tuple[int, ...], int, float]] = []
    for pairs in rounds(world):
        dist.barrier()
        pair = next((p for p in pairs if me in p), None)
        if pair is None:
            continue
        for size in PAIR_SIZES:
            tensor = torch.ones(size // 4, device=device)
            seconds = _seconds(lambda t=tensor, p=pair: _there_and_back(t, p, me), device) / 2
            found.append(("pair", Collective.SEND.value, pair, size, seconds))
    return found


def rounds(world: int) -> list[list[tuple[int, int]]]:
    """All pairs in rounds: one pair each in a small world, else a round robin (the circle method)."""
    if world <= MOST_SINGLE_PAIRS:
        return [[(a, b)] for a in range(world) for b in range(a + 1, world)]
    seats: list[int | None] = [*range(world), *([None] if world % 2 else [])]
    rounds: list[list[tuple[int, int]]] = []
    for _ in range(len(seats) - 1):
        facing = zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def _there_and_back(tensor: Tensor, pair: tuple[int, int], me: int) -> None:
    first, second = pair
    if me == first:
        dist.send(tensor, second)
        dist.recv(tensor, second)
    else:
        dist.recv(tensor, first)
        dist.send(tensor, first)
