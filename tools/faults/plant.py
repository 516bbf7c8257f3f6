"""One fault in one rank of a real training job: what it does, and at which step.

In: a `Fault` (kind, rank, step). Out: `planted(fault)` patches this process before the ranks fork; the fault goes
off in its rank only, at the first place of its step where it can.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from meshwright.doctor.hang import Cause
from meshwright.runtime import collectives, trainer
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
}
"""Faults, and the verdicts that are right for each."""
KINDS = tuple(EXPECTED)


@dataclass(frozen=True)
class Fault:
    kind: str
    rank: int
    step: int


class State:
    """What the patched functions of one process know."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.done = False
        self.step = 0
        self.skip_next = False

    def due(self) -> bool:
        return not self.done and dist.get_rank() == self.fault.rank and self.step == self.fault.step


@contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """Patch what the fault needs; forked ranks inherit it."""
    state = State(fault)
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
    """Inside a forward pass: die, stop, sleep, or ask for more memory than there is."""
    forward = PipelineExecutor._forward

    def faulty(self: Any, action: Any, microbatch: Any, live: Any) -> Any:
        if state.due() and action.microbatch == 1:
            state.done = True
            if state.fault.kind == "sigkill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif state.fault.kind == "sigstop":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif state.fault.kind == "sleep":
                time.sleep(3600)
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
    """No byte more fits into files when a checkpoint is written: the kernel says so, to real writes."""
    import resource

    save = trainer.checkpoint.save

    def on_full_disk(engine: Any, *args: Any, **options: Any) -> Any:
        if dist.get_rank() == state.fault.rank and state.step >= state.fault.step:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
        return save(engine, *args, **options)

    return [mock.patch.object(trainer.checkpoint, "save", on_full_disk)]


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
    state.done = True
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
    state.done = True
    early = torch.zeros((tensor.shape[0] * axis.size, *tensor.shape[1:]), dtype=tensor.dtype)
    collectives.reduce_scatter_first_dim(early, axis, what.replace("input", "output"))
    gathered = original(tensor, axis, what)
    state.skip_next = True
    return gathered
