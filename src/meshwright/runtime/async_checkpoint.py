"""Checkpoints written while the training goes on: tensors are copied to the host, a thread writes the copy.

In: the engine at a step that is to be kept. Out: checkpoint folders, as `checkpoint.write` makes them. At most one is
being written: the next waits for it. What goes wrong in the thread is raised in the training loop.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.errors import InputError
from meshwright.plan import Plan
from meshwright.runtime import checkpoint
from meshwright.runtime.checkpoint import DataPosition, Snapshot
from meshwright.runtime.engine import Engine


@dataclass
class _Writing:
    """A checkpoint under way: its thread, then its folder or what went wrong."""

    thread: threading.Thread
    written: Path | None = None
    problem: BaseException | None = None


class AsyncCheckpoints:
    """Of one rank; used alike on all ranks. `close` waits for the last one. Leaving the context by an error does not
    wait: the other ranks may be gone, and an unfinished folder counts for nothing."""

    def __init__(self, folder: Path, plan: Plan, model_config: Any, keep: int) -> None:
        self._folder = folder
        self._plan = plan
        self._model_config = model_config
        self._keep = keep
        # the thread talks over a group of its own, beside the training's collectives; files are written by the host
        group = dist.new_group(backend="gloo", group_desc="checkpoint")
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._buffers: dict[str, list[Tensor]] = {}
        self._under_way: _Writing | None = None
        self.last: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()

    def start(self, engine: Engine, position: DataPosition) -> None:
        """Copy the run's state (this blocks), and write it in the background."""
        self.close()
        live = checkpoint.snapshot(engine, position)
        with torch.no_grad():
            copies = {
                name: boxes.copied_into(self._buffers.setdefault(name, [])) for name, boxes in live.tensors.items()
            }
        writing = _Writing(threading.Thread(name="checkpoint", daemon=True, target=lambda: self._write(writing, taken)))
        taken = Snapshot(copies, live.progress)
        self._under_way = writing
        writing.thread.start()

    @property
    def has_ended(self) -> bool:
        """Whether the checkpoint under way has been written, or has failed: `close` says which without waiting."""
        return self._under_way is not None and not self._under_way.thread.is_alive()

    def close(self) -> None:
        """Wait for the checkpoint under way."""
        writing, self._under_way = self._under_way, None
        if writing is None:
            return
        writing.thread.join()
        if isinstance(writing.problem, OSError):
            raise InputError(f"{self._folder}: {writing.problem}") from writing.problem
        if writing.problem is not None:
            raise writing.problem
        self.last = writing.written

    def _write(self, writing: _Writing, taken: Snapshot) -> None:
        try:
            writing.written = checkpoint.write(
                taken, self._folder, self._plan, self._model_config, self._keep, self._group
            )
        except BaseException as error:
            writing.problem = error
