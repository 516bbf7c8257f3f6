"""Live bytes by kind while a step runs: every storage that an operation makes, until it is freed, fake or real.

In: an engine, before its step. Out: a `MemoryTrace`: the most of each kind, and the peak of everything that is not
state, with what was alive then, the action and the module. Storages are counted once, whatever views them; what a
kernel uses inside itself is not seen.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor

from meshwright.dryrun.trace import BEFORE
from meshwright.ledger import MemoryKind
from meshwright.runtime.engine import Engine
from meshwright.runtime.state import LocalParameter
from meshwright.schedules.actions import Action, ActionKind

STATE = (MemoryKind.PARAMETERS, MemoryKind.GRADIENTS, MemoryKind.OPTIMIZER)
SAMPLES = 2000
"""Points of the curve over time that are kept, at most twice as many."""


@dataclass(frozen=True)
class Peak:
    """The most that was alive at once, and when. `module` is the innermost one at work, where there is one."""

    bytes_by_kind: dict[MemoryKind, int]
    action: str
    module: str

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_by_kind.values())

    @property
    def working_bytes(self) -> int:
        """Everything that is not parameters, gradients or optimizer state."""
        return sum(n for kind, n in self.bytes_by_kind.items() if kind not in STATE)


@dataclass(frozen=True)
class MemoryTrace:
    """`largest`: the most of each kind at any time; `peak` of everything, `working` of what is not state; `curve`: (all
    live bytes, live bytes that are not state) at even numbers of allocations."""

    largest: dict[MemoryKind, int]
    peak: Peak
    working: Peak
    curve: tuple[tuple[int, int], ...]


REDUCE_SCATTER = torch.ops.c10d._reduce_scatter_base_.default

Change = tuple[MemoryKind, int]
"""Bytes of a kind that came (or went, if negative)."""


@dataclass
class _Storage:
    nbytes: int
    kind: MemoryKind
    action: int
    reference: Any = field(repr=False, default=None)


class MemoryTracker:
    """Watches one engine (watch.py) through a step, with `at` told what the executor does. `copies`: reductions are
    scattered from a copy of what is reduced, as gloo does under a live run."""

    def __init__(self, engine: Engine, copies: bool = False) -> None:
        self._engine = engine
        self._copies = copies
        self._alive: dict[int, _Storage] = {}
        self._bytes = dict.fromkeys(MemoryKind, 0)
        self._largest = dict.fromkeys(MemoryKind, 0)
        self._action, self._number, self._forward = BEFORE, 0, False
        self._modules: list[str] = []
        self._ends: list[tuple[int, str]] = []  # (autograd's number at a module's end, its name), of the last forward
        self._sharded = any(isinstance(m, FSDPModule) for m in engine.chunks.values())
        self._gathered = MemoryKind.BUFFERS if engine.config.zero == 3 else MemoryKind.PARAMETERS
        self._total = self._working = 0
        self._peak = self._working_peak = self._snapshot()
        self._curve: list[tuple[int, int]] = []
        self._every, self._seen = 1, 0
        self._changes: list[Change] | None = None
        self._names = {id(m): name for chunk in engine.chunks.values() for name, m in chunk.named_modules()}
        self._register_state()

    def at(self, step: tuple[Action, ...]) -> None:
        """The executor is about to run these actions: what the one before has left is kept for later."""
        self.settle()
        self._number += 1
        self._action = " ".join(str(a) for a in step) or "end of the step"
        self._forward = len(step) == 1 and step[0].kind is ActionKind.FORWARD

    def new_changes(self) -> list[Change]:
        """What came and went since the last call (nothing at the first), in order. It is kept from now on."""
        found, self._changes = self._changes or [], []
        return found

    def keep_changes(self, keep: bool) -> None:
        self._changes = [] if keep else None

    def repeat(self, changes: Sequence[Change], times: int) -> None:
        """What just happened happens as often again. It left everything as it was, so no level is new: only the curve
        goes on."""
        total, working = self._total, self._working
        points: list[tuple[int, int]] = []
        for kind, nbytes in changes:
            total += nbytes
            working += 0 if kind in STATE else nbytes
            if nbytes > 0:
                points.append((total, working))
        for _ in range(times):
            self._sample(points)

    def result(self) -> MemoryTrace:
        self.settle()
        return MemoryTrace(
            {k: n for k, n in self._largest.items() if n}, self._peak, self._working_peak, tuple(self._curve)
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on modules, on FSDP2's reductions, and on storages that change their size (FSDP2 frees weights so)."""
        reduce = FSDPParamGroup.post_backward

        def reduced(group: FSDPParamGroup, *unused: Any) -> None:
            reduce(group, *unused)
            self._mark_gradients(group)

        gather = FSDPParamGroup.wait_for_unshard

        def gathered(group: FSDPParamGroup) -> None:
            gather(group)
            self._mark_weights(group)

        FSDPParamGroup.post_backward = reduced  # pyright: ignore[reportAttributeAccessIssue]
        FSDPParamGroup.wait_for_unshard = gathered  # pyright: ignore[reportAttributeAccessIssue]
        pre = nn.modules.module.register_module_forward_pre_hook(self._enter_module)
        post = nn.modules.module.register_module_forward_hook(self._leave_module, always_call=True)
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._resize(storage, size)
            return result

        torch.UntypedStorage.resize_ = resized  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize
            FSDPParamGroup.post_backward, FSDPParamGroup.wait_for_unshard = reduce, gather
            pre.remove()
            post.remove()

    def issued(self, func: Any, args: Sequence[Any]) -> None:
        """Of collectives only the copy counts that gloo makes."""
        if self._copies and func is REDUCE_SCATTER:
            reduced = args[1]
            self._count(MemoryKind.TEMPORARIES, reduced.nbytes)
            self._count(MemoryKind.TEMPORARIES, -reduced.nbytes)

    def made(self, tensor: Tensor) -> None:
        self._add(tensor, MemoryKind.TEMPORARIES)

    def _register_state(self) -> None:
        """What the engine holds before a step. Under ZeRO-3 the fp32 shard is parameter and master weight in one; where
        gathered weights are held beside it, it is the master (optimizer state)."""
        zero_3 = self._engine.config.zero == 3
        for parameter in self._engine.parameters:
            stored = MemoryKind.PARAMETERS if zero_3 or not self._sharded else MemoryKind.OPTIMIZER
            self._mark(parameter.local, stored)
            self._mark(parameter.master, MemoryKind.OPTIMIZER)  # where it is another tensor
            self._mark_gradient(parameter)
        for state in self._engine.optimizer.adamw.state.values():
            for name, tensor in state.items():
                # the step counters are one number per parameter: no part of what a formula counts
                self._mark(tensor, MemoryKind.BUFFERS if name == "step" else MemoryKind.OPTIMIZER)
        for chunk in self._engine.chunks.values():
            for buffer in chunk.buffers():
                self._mark(buffer, MemoryKind.BUFFERS)

    def _mark_gradient(self, parameter: LocalParameter) -> None:
        if parameter.gradient is not None:
            self._mark(parameter.gradient, MemoryKind.GRADIENTS)

    def settle(self) -> None:
        """The action is over: name what outlives it. Activations of a forward pass, buffers of others."""
        for storage in self._alive.values():
            if storage.action == self._number and storage.kind is MemoryKind.TEMPORARIES:
                self._move(storage, MemoryKind.ACTIVATIONS if self._forward else MemoryKind.BUFFERS)

    def _mark_gradients(self, group: FSDPParamGroup) -> None:
        """Of an FSDP unit whose backward pass has ended. Gradients are what accumulates: shards, and under ZeRO-1 whole
        ones until they are reduced (FSDP2 keeps them on the gathered parameters, or apart in fp32)."""
        for held in group.fsdp_params:
            found = [held.sharded_param.grad]
            if self._engine.config.zero == 1:
                found += [held.unsharded_accumulated_grad, _gradient_of(held)]
            for tensor in found:
                if tensor is not None:
                    self._mark(tensor, MemoryKind.GRADIENTS)

    def _mark_weights(self, group: FSDPParamGroup) -> None:
        """Of an FSDP unit that is gathered."""
        for held in group.fsdp_params:
            if hasattr(held, "_unsharded_param"):
                self._mark(held.unsharded_param, self._gathered)

    def _enter_module(self, module: nn.Module, _args: Any) -> None:
        self._modules.append(self._names.get(id(module), type(module).__name__))

    def _leave_module(self, module: nn.Module, _args: Any, output: Any) -> None:
        name = self._modules.pop()
        node = output.grad_fn if isinstance(output, Tensor) else None
        if node is not None:
            if not self._modules:
                self._ends.clear()
            self._ends.append((node._sequence_nr(), name))

    def _module(self) -> str:
        """Forward: the innermost module; backward: the one whose forward pass made the node at work."""
        if self._modules:
            return self._modules[-1]
        node = torch._C._current_autograd_node()
        if node is None or not self._ends:
            return ""
        at = bisect_left(self._ends, (node._sequence_nr(), ""))
        return self._ends[min(at, len(self._ends) - 1)][1]

    def _add(self, tensor: Tensor, kind: MemoryKind) -> _Storage | None:
        storage = _storage_of(tensor)
        key = storage._cdata
        known = self._alive.get(key)
        if known is not None:
            return known
        nbytes = storage.nbytes()
        added = _Storage(nbytes, kind, self._number)
        added.reference = weakref.ref(storage, self._freed(key))
        self._alive[key] = added
        self._count(kind, nbytes)
        return added

    def _freed(self, key: int) -> Callable[[Any], None]:
        def forget(_reference: Any) -> None:
            gone = self._alive.pop(key, None)
            if gone is not None:
                self._count(gone.kind, -gone.nbytes)

        return forget

    def _mark(self, tensor: Tensor, kind: MemoryKind) -> None:
        known = self._alive.get(_storage_of(tensor)._cdata)
        if known is None:
            self._add(tensor, kind)
        elif known.kind not in STATE:
            self._move(known, kind)

    def _move(self, storage: _Storage, kind: MemoryKind) -> None:
        if storage.kind is not kind:
            self._count(storage.kind, -storage.nbytes)
            storage.kind = kind
            self._count(kind, storage.nbytes)

    def _resize(self, storage: torch.UntypedStorage, size: int) -> None:
        known = self._alive.get(storage._cdata)
        if known is not None:
            self._count(known.kind, size - known.nbytes)
            known.nbytes = size

    def _count(self, kind: MemoryKind, nbytes: int) -> None:
        if self._changes is not None:
            self._changes.append((kind, nbytes))
        self._bytes[kind] += nbytes
        self._largest[kind] = max(self._largest[kind], self._bytes[kind])
        self._total += nbytes
        if kind not in STATE:
            self._working += nbytes
        if nbytes <= 0:
            return
        if self._total > self._peak_total:
            self._peak_total, self._peak = self._total, self._snapshot()
        if self._working > self._working_total:
            self._working_total, self._working_peak = self._working, self._snapshot()
        self._sample(((self._total, self._working),))

    _peak_total = 0
    _working_total = 0

    def _snapshot(self) -> Peak:
        return Peak({k: n for k, n in self._bytes.items() if n}, self._action, self._module())

    def _sample(self, points: Sequence[tuple[int, int]]) -> None:
        """Keep every so many of them, and half as many as soon as there are enough."""
        at = 0
        while (to_next := self._every - self._seen % self._every) <= len(points) - at:
            at, self._seen = at + to_next, self._seen + to_next
            self._curve.append(points[at - 1])
            if len(self._curve) == 2 * SAMPLES:
                self._curve, self._every = self._curve[1::2], 2 * self._every
        self._seen += len(points) - at


def _gradient_of(held: Any) -> Tensor | None:
    unsharded = getattr(held, "_unsharded_param", None)
    return None if unsharded is None else unsharded.grad


def _storage_of(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
