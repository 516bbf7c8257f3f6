"""Start the ranks of a job: forked on one machine (tests, parity, laptops) or joined from torchrun's environment.

In: a world size and a body that every rank runs with torch.distributed ready. Out: what each rank returned, or
`RankFailedError` with the traceback of the rank that failed first. Forking after the imports starts 8 ranks in well
under a second where spawning pays eight imports of torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import platform
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.rendezvous import rendezvous

from meshwright.errors import InputError
from meshwright.runtime.host_turns import take_long_turns
from meshwright.runtime.start_store import store_of_this_start

PR_SET_PDEATHSIG = 1  # linux/prctl.h
GRACE_S = 2.0
DYING_S = 1.0
"""A killed process closes its sockets before it counts as ended, perhaps by a turn of every rank on its core."""

T = TypeVar("T")


class RankFailedError(RuntimeError):
    """A rank raised, died or did not end in time. `rank` is the first of them; `exit_code` that of a process which died
    without a word (negative: the signal that ended it)."""

    def __init__(self, rank: int, reason: str, exit_code: int | None = None) -> None:
        super().__init__(f"rank {rank} {reason}")
        self.rank = rank
        self.reason = reason
        self.exit_code = exit_code


@dataclass(frozen=True)
class Device:
    """Where tensors live and which backend moves them; chosen once at start-up and passed along."""

    type: str
    backend: str
    index: int | None = None

    @property
    def torch(self) -> torch.device:
        return torch.device(self.type) if self.index is None else torch.device(self.type, self.index)


def choose_device(local_rank: int) -> Device:
    """CUDA with NCCL where there is a GPU per local rank, else CPU with gloo."""
    if torch.cuda.is_available() and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
        return Device("cuda", "nccl", local_rank)
    return Device("cpu", "gloo")


def gpus_here() -> int:
    """GPUs that this process can see."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def host_name() -> str:
    """This machine, as the doctor names it: under torchrun with the number of the agent, for machines (or network
    namespaces) of one name."""
    agent = os.environ.get("GROUP_RANK")
    return platform.node() if agent is None else f"{platform.node()}#{agent}"


def launched_by_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys()


@contextlib.contextmanager
def joined_world(
    timeout_s: float = 1800.0, around: Callable[[Device, Callable[[], None]], None] | None = None
) -> Iterator[Device]:
    """The world that torchrun or torchelastic prepared for this process. `around` is given the call that joins it,
    to look around before it makes that call."""
    device = choose_device(int(os.environ["LOCAL_RANK"]))

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

    def join() -> None:
        timeout = timedelta(seconds=timeout_s)
        shared, _, _ = next(iter(rendezvous("env://", timeout=timeout)))
        store = store_of_this_start(shared, rank, world, timeout_s)
        _share_cores(device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        dist.init_process_group(device.backend, store=store, rank=rank, world_size=world, timeout=timeout)

    if around is None:
        join()
    else:
        around(device, join)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def run_ranks(
    world_size: int,
    body: Callable[..., Any],
    *args: Any,
    timeout_s: float = 120.0,
    device: Device | None = None,
    endless: bool = False,
    on_failure: Callable[[int], None] | None = None,
) -> list[Any]:
    """Run `body(*args)` in `world_size` forked processes joined by torch.distributed; results in rank order.

    The body reads its rank from torch.distributed. Results travel back through a pipe, so keep them small. All must end
    within `timeout_s`, unless the job is `endless`: then the limit holds for each collective only. `on_failure` is told
    the rank that failed first, before the others are ended.
    """
    context = multiprocessing.get_context("fork")
    listener = socket.create_server(("127.0.0.1", 0), backlog=max(16, 2 * world_size))
    port = int(listener.getsockname()[1])
    flush_output()
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    chosen = device or Device("cpu", "gloo")
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_child,
                args=(rank, world_size, listener.fileno(), port, chosen, timeout_s, sender, os.getpid(), body, args),
                daemon=True,
            )
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        return _collect(processes, pipes, None if endless else timeout_s)
    except RankFailedError as error:
        if on_failure is not None:
            on_failure(error.rank)
        raise
    finally:
        listener.close()
        _stop(processes)
        for pipe in pipes:
            pipe.close()


def flush_output() -> None:
    """What is buffered now would be printed by every child as well."""
    sys.stdout.flush()
    sys.stderr.flush()


def _child(
    rank: int,
    world_size: int,
    listen_fd: int,
    port: int,
    device: Device,
    timeout_s: float,
    sender: Connection,
    parent: int,
    body: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    _die_with_parent(parent)
    try:
        torch.set_num_threads(1)
        _share_cores(device, world_size)
        timeout = timedelta(seconds=timeout_s)
        fd = listen_fd if rank == 0 else None
        store = TCPStore("127.0.0.1", port, world_size, rank == 0, timeout=timeout, master_listen_fd=fd)
        dist.init_process_group(device.backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        result = body(*args)
        # no rank may leave while another still talks to it (rank 0 also hosts the store)
        dist.barrier()
        sender.send((True, result))
        dist.destroy_process_group()
    except InputError as error:
        sender.send((False, error))
        os._exit(1)
    except BaseException:
        sender.send((False, traceback.format_exc()))
        flush_output()
        os._exit(1)


def _share_cores(device: Device, ranks_here: int) -> None:
    """To be called before the backend starts its threads, which inherit it."""
    if device.type == "cpu":
        take_long_turns(ranks_here)


def _die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies, so that no rank is left behind."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _collect(processes: list[BaseProcess], pipes: list[Connection], timeout_s: float | None) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    pending = dict(enumerate(pipes))
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while pending:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait(list(pending.values()), timeout=left)
        if not ready:
            raise RankFailedError(min(pending), f"(and {len(pending) - 1} more) did not end within {timeout_s:g} s")
        for rank in [r for r, pipe in pending.items() if pipe in ready]:
            try:
                succeeded, value = pending.pop(rank).recv()
            except EOFError:
                processes[rank].join(GRACE_S)
                _raise_if_killed(processes)
                code = processes[rank].exitcode
                raise RankFailedError(rank, f"died with exit code {code}", code) from None
            if isinstance(value, InputError):
                raise value
            if not succeeded:
                _raise_if_killed(processes, DYING_S)
                raise RankFailedError(rank, f"failed:\n{value}")
            results[rank] = value
    return results


def _raise_if_killed(processes: list[BaseProcess], patience_s: float = 0.0) -> None:
    """A rank that a signal ended is the cause of what its peers then report, in whatever order they do. `patience_s`:
    how long to look for one while others still run."""
    deadline = time.monotonic() + patience_s
    while True:
        codes = [process.exitcode for process in processes]
        for rank, code in enumerate(codes):
            if code is not None and code < 0:
                raise RankFailedError(rank, f"was killed by {signal.Signals(-code).name}", code)
        if None not in codes or time.monotonic() >= deadline:
            return
        time.sleep(0.01)


def _stop(processes: list[BaseProcess]) -> None:
    """Let finished ranks leave by themselves, then kill what remains."""
    deadline = time.monotonic() + GRACE_S
    clean = all(p.exitcode in (None, 0) for p in processes)
    for process in processes:
        if clean:
            process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()


def on_each_machine_first(work: Callable[[], T]) -> T:
    """Under torchrun: do `work` on the first rank of each machine, then (where it leaves files behind) on the others.

    An InputError on one rank is raised on all of them, so that nobody waits for a rank that gave up.
    """
    problem: str | None = None
    result: list[T] = []
    for turn in (True, False):
        if problem is None and (os.environ["LOCAL_RANK"] == "0") is turn:
            try:
                result.append(work())
            except InputError as error:
                problem = str(error)
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        problem = next((p for p in problems if p is not None), None)
    if problem is not None:
        raise InputError(problem)
    return result[0]
