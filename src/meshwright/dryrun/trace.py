"""What a rank really issues: every c10d operation below autograd, in order, with the subject that the runtime states.

In: the process groups of a rank, real or fake. Out: `Event`s. A collective that was stated but not issued, issued but
not stated, or issued with another size or group than stated is an error of the program, and raised as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.ledger import Collective, Phase, TrafficEntry
from meshwright.runtime.recorder import Recorder
from meshwright.schedules.actions import COMMUNICATION, Action

COLLECTIVES = {
    "allreduce_": Collective.ALL_REDUCE,
    "_allgather_base_": Collective.ALL_GATHER,
    "_reduce_scatter_base_": Collective.REDUCE_SCATTER,
    "alltoall_base_": Collective.ALL_TO_ALL,
    "broadcast_": Collective.BROADCAST,
    "send": Collective.SEND,
    "recv_": Collective.RECEIVE,
}
SIZED_BY_INPUT = (Collective.REDUCE_SCATTER, Collective.ALL_TO_ALL)
"""Whose bytes are those of the second tensor (ledger.py)."""

POINT_TO_POINT = (Collective.SEND, Collective.RECEIVE)
BEFORE = "start of the step"
AFTER = "end of the step"


class TraceError(RuntimeError):
    """What the program issued is not what it stated."""


@dataclass(frozen=True)
class Stated:
    """What the runtime's recorder was told just before a call."""

    axis: str
    collective: Collective
    phase: Phase
    what: str
    group_size: int
    call_bytes: int


@dataclass(frozen=True)
class Event:
    """One call. `group`: global ranks in axis order; `peer`: the other end of a message; `action`: what the schedule
    was at, and which of its actions that was (`step`, counted from 0; messages of one batch share it)."""

    axis: str
    collective: Collective
    phase: Phase
    what: str
    group: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    call_bytes: int
    action: str
    step: int
    peer: int | None = None

    @property
    def kind(self) -> tuple[Collective, str, tuple[int, ...]]:
        """What all ranks of a group must agree on."""
        return self.collective, self.dtype, self.shape

    def __str__(self) -> str:
        other = "" if self.peer is None else f" with rank {self.peer}"
        shape = "x".join(str(n) for n in self.shape)
        return f"{self.collective} of {self.what} [{shape}] {self.dtype} on {self.axis}{other} at {self.action}"


class StatingRecorder(Recorder):
    """A recorder that also keeps the order in which calls were stated, until the tracer sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.stated: list[Stated] = []

    def record(self, axis: str, collective: Collective, what: str, group_size: int, call_bytes: int) -> None:
        super().record(axis, collective, what, group_size, call_bytes)
        self.stated.append(Stated(axis, collective, self.phase, what, group_size, call_bytes))


class Tracer:
    """Collects the events of everything that it watches (watch.py). Give `at` to the executor as its observer."""

    def __init__(self, recorder: StatingRecorder) -> None:
        self.events: list[Event] = []
        self._recorder = recorder
        self._members: dict[str, tuple[int, ...]] = {}
        self._action = BEFORE
        self._step = -1
        self._messages: list[str] = []  # of the batch under way, in the order in which they are posted

    def at(self, step: tuple[Action, ...], number: int | None = None) -> None:
        """The executor is about to run these actions (one computation, or a batch of messages; none: it is done).
        `number`: which of the schedule's it is, if not the next."""
        self._action = " ".join(str(a) for a in step) or AFTER
        self._step = self._step + 1 if number is None else number
        self._messages = [str(a) for a in step if a.kind in COMMUNICATION]

    def finish(self) -> tuple[Event, ...]:
        """The events; an error if something was stated and never issued."""
        if self._recorder.stated:
            missing = self._recorder.stated[0]
            raise TraceError(f"{missing.collective} of {missing.what} on {missing.axis} was stated but never issued")
        return tuple(self.events)

    def made(self, tensor: Tensor) -> None:
        """Tensors are none of its business."""

    def issued(self, func: Any, args: Sequence[Any]) -> None:
        name = func._schema.name.partition("::")[2]
        collective = COLLECTIVES.get(name)
        if collective is None or func.namespace != "c10d":
            raise TraceError(f"{func.namespace}::{name} was issued at {self._action}: the ledger has no name for it")
        tensor = _tensor(collective, args)
        members = self._ranks(next(a for a in args if isinstance(a, torch.ScriptObject)))
        size = tensor.numel() * tensor.element_size()
        stated = self._take(collective, len(members), size)
        peer = members[args[2]] if collective in POINT_TO_POINT else None
        action = self._messages.pop(0) if peer is not None and self._messages else self._action
        shape = tuple(tensor.shape)
        self.events.append(
            Event(
                stated.axis,
                collective,
                stated.phase,
                stated.what,
                members,
                shape,
                str(tensor.dtype).removeprefix("torch."),
                size,
                action,
                self._step,
                peer,
            )
        )

    def _take(self, collective: Collective, group_size: int, size: int) -> Stated:
        """The first open statement that fits what is issued (FSDP2 states the sum over replicas early)."""
        for index, stated in enumerate(self._recorder.stated):
            if (stated.collective, stated.group_size, stated.call_bytes) == (collective, group_size, size):
                return self._recorder.stated.pop(index)
        raise TraceError(
            f"{collective} of {size} bytes over {group_size} ranks was issued at {self._action} without being stated"
        )

    def _ranks(self, group: torch.ScriptObject) -> tuple[int, ...]:
        process_group = dist.ProcessGroup.unbox(group)
        name = process_group.group_name
        if name not in self._members:
            self._members[name] = tuple(dist.get_process_group_ranks(process_group))
        return self._members[name]


def _tensor(collective: Collective, args: Any) -> Tensor:
    """The larger buffer of a call, as the ledger counts it."""
    if isinstance(args[0], Tensor):
        return args[1] if collective in SIZED_BY_INPUT else args[0]
    (tensor,) = args[0]
    return tensor


def traffic_of(events: Iterable[Event]) -> tuple[TrafficEntry, ...]:
    """The ledger lines of a trace."""
    counts: dict[tuple[Any, ...], list[int]] = {}
    for e in events:
        entry = counts.setdefault((e.axis, e.collective, e.phase, e.what, len(e.group)), [0, 0])
        entry[0] += 1
        entry[1] += e.call_bytes
    lines = [TrafficEntry(*key, calls=calls, total_bytes=total) for key, (calls, total) in counts.items()]
    return tuple(sorted(lines, key=lambda e: (e.axis, e.phase, e.collective, e.what, e.group_size)))
