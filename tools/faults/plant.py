"""One fault in one rank of a real training job: what it does, and at which step.

In: a `Fault` (kind, rank, step) and the run's folder. Out: `planted(fault, folder)` patches this process before ranks
fork. The fault goes off in its rank only, at the first place of its step where it can, and notes the checkpoints that
were complete then: they must still be there when the job is over.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from meshwright.doctor.hang import Cause
from meshwright.files import write_text
from meshwright.runtime import checkpoint, collectives, trainer
from meshwright.runtime.pipeline import PipelineExecutor
from meshwright.runtime.stage import StageModule

EXPECTED = {
    "sigkill": (Cause.DEAD,),
    "sigstop": (Cause.STOPPED,),
    "sleep": (Cause.WAITED_FOR,),
    "slow": (Cause.SLOW,),
    "skip": (Cause.SKIPPED, Cause.ORDER),  # of a rank that blocks in the wrong call the two look the same
    "swap": (Cause.ORDER,),
    "size": (Cause.SIZE,),
    "dtype": (Cause.DTYPE,),
    "plan": (Cause.PLAN,),
    "disk": (Cause.FAILED,),
    "memory": (Cause.FAILED,),
    "partition": (Cause.NETWORK,),
}
"""Faults, and the verdicts that are right for each."""
KINDS = tuple(EXPECTED)
NOTE = "checkpoints-at-the-fault.json"
FULL_BYTES = 16 * 2**10
"""Of a file on the full disk: more than a line of metrics, less than a rank's part of a checkpoint."""


@dataclass(frozen=True)
class Fault:
    kind: str
    rank: int
    step: int


class State:
    """What the patched functions of one process know."""

    def __init__(self, fault: Fault, folder: Path) -> None:
        self.fault = fault
        self.folder = folder
        self.done = False
        self.step = 0
        self.skip_next = False

    def due(self) -> bool:
        return not self.done and dist.get_rank() == self.fault.rank and self.step == self.fault.step

    def goes_off(self) -> None:
        self.done = True
        names = [path.name for path in checkpoint.complete(self.folder / trainer.CHECKPOINTS)]
        write_text(self.folder / NOTE, json.dumps(names))


def complete_when_it_went_off(folder: Path) -> set[str]:
    """Names of checkpoints; none where the fault is there from the start."""
    note = folder / NOTE
    return set(json.loads(note.read_text(encoding="utf-8"))) if note.exists() else set()


@contextmanager
def planted(fault: Fault, folder: Path) -> Iterator[None]:
    """Patch what the fault needs; forked ranks inherit it."""
    state = State(fault, folder)
    patches: list[Any] = []
    step = trainer.Trainer.step

    def counted(self: Any) -> Any:
        state.step = self.engine.steps_done + 1
        return step(self)

    patches.append(mock.patch.object(trainer.Trainer, "step", counted))
    patches += {
        "skip": _collective, "swap": _collective, "size": _collective, "dtype": _collective,
        "disk": _disk, "plan": _plan, "slow": _slow,
    }.get(fault.kind, _in_action)(state)  # fmt: skip
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()


def _in_action(state: State) -> list[Any]:
    """Inside a forward pass: die, stop, sleep, pull the machine's cable, or ask for more memory than there is."""
    forward = PipelineExecutor._forward

    def faulty(self: Any, action: Any, microbatch: Any, live: Any) -> Any:
        if state.due() and action.microbatch == 1:
            state.goes_off()
            if state.fault.kind == "sigkill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif state.fault.kind == "sigstop":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif state.fault.kind == "sleep":
                time.sleep(3600)
            elif state.fault.kind == "partition":
                subprocess.run(["ip", "link", "set", os.environ["GLOO_SOCKET_IFNAME"], "down"], check=True)
            else:
                torch.empty(1 << 50)
        return forward(self, action, microbatch, live)

    return [mock.patch.object(PipelineExecutor, "_forward", faulty)]


def _slow(state: State) -> list[Any]:
    """Every forward pass of the rank takes more than twice its time."""
    forward = StageModule.forward

    def slowed(self: Any, *args: Any) -> Any:
        if dist.get_rank() == state.fault.rank:
            time.sleep(0.25)
        return forward(self, *args)

    return [mock.patch.object(StageModule, "forward", slowed)]


def _plan(state: State) -> list[Any]:
    train_rank = trainer.train_rank

    def other(job: Any, device: Any) -> Any:
        if dist.get_rank() == state.fault.rank:
            run = job.plan.training.model_copy(update={"learning_rate": 0.123})
            job = replace(job, plan=job.plan.model_copy(update={"training": run}))
        return train_rank(job, device)

    return [mock.patch.object(trainer, "train_rank", other)]


def _disk(state: State) -> list[Any]:
    """A checkpoint's file does not fit any more, what is short still does: the kernel says so, to real writes. (The
    limit is of the process: the thread that writes checkpoints asks for it.)"""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # only the main thread may; the ranks inherit it
    write = checkpoint.write

    def on_full_disk(taken: Any, *args: Any, **options: Any) -> Any:
        if dist.get_rank() == state.fault.rank and taken.progress.step >= state.fault.step:
            state.goes_off()
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_BYTES, FULL_BYTES))
        return write(taken, *args, **options)

    return [mock.patch.object(checkpoint, "write", on_full_disk)]


def _collective(state: State) -> list[Any]:
    """In a tp collective of the rank: left out, two exchanged, another size, another dtype."""
    names = ("all_gather_first_dim", "reduce_scatter_first_dim")
    patches: list[Any] = []
    for name in names:
        original = getattr(collectives, name)

        def faulty(tensor: torch.Tensor, axis: Any, what: str, original: Any = original, name: str = name) -> Any:
            if state.skip_next and axis.axis == "tp" and "scatter" in name:
                state.skip_next = False
                return tensor.chunk(axis.size)[axis.rank].clone()
            if axis.axis != "tp" or not state.due():
                return original(tensor, axis, what)
            return _spoilt(state, original, name, tensor, axis, what)

        patches.append(mock.patch.object(collectives, name, faulty))
    return patches


def _spoilt(state: State, original: Any, name: str, tensor: torch.Tensor, axis: Any, what: str) -> Any:
    kind = state.fault.kind
    if kind == "swap":
        return _exchanged(state, original, name, tensor, axis, what)
    state.goes_off()
    if kind == "skip":
        n = axis.size
        return tensor.repeat(n, *[1] * (tensor.dim() - 1)) if "gather" in name else tensor.chunk(n)[axis.rank].clone()
    if kind == "size":
        longer = torch.cat([tensor, tensor])
        return original(longer, axis, what)[: tensor.shape[0] * (axis.size if "gather" in name else 1)]
    return original(tensor.double(), axis, what).to(tensor.dtype)


def _exchanged(state: State, original: Any, name: str, tensor: torch.Tensor, axis: Any, what: str) -> Any:
    """A gather and the reduce-scatter after it change places: the scatter's call first (of zeros), then the gather."""
    if "gather" not in name:
        return original(tensor, axis, what)
    state.goes_off()
    early = torch.zeros((tensor.shape[0] * axis.size, *tensor.shape[1:]), dtype=tensor.dtype)
    collectives.reduce_scatter_first_dim(early, axis, what.replace("input", "output"))
    gathered = original(tensor, axis, what)
    state.skip_next = True
    return gathered
