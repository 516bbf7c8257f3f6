"""A tape of allocations: live bytes and their peak while a program, forward and backward, is walked through.

A `Storage` lives while somebody holds it: a local name, autograd, the next product. Functions of this package return a
result and a `Backward`, which takes the gradient of the result (and gives it up) and what has been accumulated for the
input so far, and returns the input's gradient with both added up.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True, eq=False)
class Storage:
    """Bytes that live while they have holders; a view has no bytes of its own and holds its base."""

    nbytes: float
    holders: int = 1
    base: Storage | None = None


class Backward(Protocol):
    """Gradient of a result to gradient of the input, added to what the input has already."""

    def __call__(self, gradient: Storage, accumulated: Storage | None = None) -> Storage: ...


class UnitHooks(Protocol):
    """What runs around a module that is an FSDP unit of its own inside a layer (routed experts)."""

    def gather(self) -> None: ...

    def release(self) -> None: ...

    def needed(self) -> None: ...

    def reduce(self) -> None: ...


class Tape:
    """Counts live bytes. `saving`: autograd keeps what it needs (not within a checkpoint's first pass). `split`:
    backward passes leave the gradients of weights for later. `gathered`: weights' gradients stay until their FSDP unit
    is done. `at_once`: linear products add theirs to the accumulated ones, without a tensor of their own if these are
    as precise."""

    def __init__(self, *, split: bool = False, gathered: bool = False, at_once: bool = False) -> None:
        self.live = self.peak = 0.0
        self.saving = True
        self.split = split
        self.gathered = gathered
        self.at_once = at_once
        self.left: list[tuple[Storage, ...]] = []  # inputs and gradients of products whose weight gradient is due
        self.left_weight_bytes = 0.0  # the largest weight gradient of those
        self.unit_gradients: list[Storage] = []
        self.experts: UnitHooks | None = None  # of the layer that is walked through
        self.head_gradient: Storage | None = None  # of tied embeddings, until the embedding's own

    def new(self, nbytes: float) -> Storage:
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        return Storage(nbytes)

    def view(self, base: Storage, nbytes: float) -> Storage:
        """A part of a storage that keeps the whole alive."""
        return Storage(nbytes, base=self.hold(base))

    def hold(self, storage: Storage) -> Storage:
        storage.holders += 1
        return storage

    def drop(self, *storages: Storage | None) -> None:
        for storage in storages:
            if storage is None:
                continue
            storage.holders -= 1
            if storage.holders == 0 and storage.base is not None:
                self.drop(storage.base)
            elif storage.holders == 0:
                self.live -= storage.nbytes

    def save(self, storage: Storage) -> Storage | None:
        """Autograd keeps a tensor that lives already."""
        return self.hold(storage) if self.saving else None

    def passing(self, *nbytes: float) -> None:
        """Made one after the other, all gone at the end."""
        self.drop(*[self.new(n) for n in nbytes])

    def add(self, one: Storage, other: Storage | None) -> Storage:
        """Two gradients of one tensor meet."""
        if other is None:
            return one
        total = self.new(max(one.nbytes, other.nbytes))
        self.drop(one, other)
        return total

    def weight_gradient(self, gradient: Storage) -> None:
        """A weight's gradient is complete: added to the accumulated one and gone, or kept for its FSDP unit."""
        if self.gathered:
            self.unit_gradients.append(gradient)
        else:
            self.drop(gradient)

    def leave(self, inputs: Storage, gradient: Storage, weight_bytes: float) -> None:
        """Keep what a weight's gradient needs until its own action."""
        self.left.append((self.hold(inputs), self.hold(gradient)))
        self.left_weight_bytes = max(self.left_weight_bytes, weight_bytes)

    @contextmanager
    def forgetting(self) -> Generator[None]:
        """Inside, autograd saves nothing: the first pass of a checkpoint."""
        before, self.saving = self.saving, False
        try:
            yield
        finally:
            self.saving = before
