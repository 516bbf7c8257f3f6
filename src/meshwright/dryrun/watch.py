"""Who sees every operation of a program: collectives before they are issued, tensors once they are made.

In: `Watcher`s. Out: a dispatch mode for real tensors (`WatchedOperations`); for fake ones see shapes.py. Of an
operation on DTensors the result is told, not what it is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Watcher(Protocol):
    """`issued`: an operation of torch.distributed is about to run. `made`: this tensor came out of an operation."""

    def issued(self, func: Any, args: Sequence[Any]) -> None: ...

    def made(self, tensor: Tensor) -> None: ...


def is_collective(func: Any) -> bool:
    return func.namespace in ("c10d", "_c10d_functional")


def tell_made(watchers: Sequence[Watcher], result: Any) -> None:
    """Every tensor of a result, however it is nested in lists."""
    if isinstance(result, Tensor):
        for watcher in watchers:
            watcher.made(result)
    elif isinstance(result, list | tuple):
        for part in result:
            tell_made(watchers, part)


class WatchedOperations(TorchDispatchMode):
    """Real tensors: everything runs as it would, and is told to the watchers."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        super().__init__()
        self._watchers = tuple(watchers)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_collective(func):
            for watcher in self._watchers:
                watcher.issued(func, args)
        result = func(*args, **(kwargs or {}))
        tell_made(self._watchers, result)
        return result
