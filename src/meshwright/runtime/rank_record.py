"""What every rank leaves in its run's folder for the doctor: its steps, its memory, and how it failed.

Out: under `ranks/`, per rank, `rank-00003.jsonl` (a line per step, appended), `rank-00003.memory.json` and
`rank-00003.error.json` (written whole or not at all). Readable after kill -9: a line that was cut off is the last one.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from meshwright.files import write_text
from meshwright.flight import FlightLog
from meshwright.flight.incident import FAILURE_SUFFIX, FAILURES_FOLDER
from meshwright.runtime.engine import Engine
from meshwright.runtime.launch import host_name
from meshwright.runtime.metrics import peak_memory_bytes
from meshwright.runtime.process_groups import ProcessGroupManager

MEMORY_EVERY = 16
"""Steps between two memory records, once the first two steps are done (peaks come early)."""
MOST_MESSAGE, MOST_TRACEBACK = 2000, 4000


@dataclass(frozen=True)
class Place:
    """Where a rank is: its coordinates on the mesh and its machine."""

    rank: int
    coordinates: dict[str, int]
    host: str

    def file(self, folder: Path, kind: str) -> Path:
        return folder / FAILURES_FOLDER / f"rank-{self.rank:05d}.{kind}"


def place_of(engine: Engine, host: str | None = None) -> Place:
    """This rank's."""
    return _place(engine.groups, host or platform.node())


def _place(groups: ProcessGroupManager, host: str) -> Place:
    found = groups.layout.coordinates([groups.rank])
    return Place(groups.rank, {axis: int(value[0]) for axis, value in found.items()}, host)


class FailureNote:
    """What a rank leaves when it fails, wherever that was. `engine` is known once it is built."""

    def __init__(self, folder: Path, groups: ProcessGroupManager, log: FlightLog, resident_bytes: int) -> None:
        self.engine: Engine | None = None
        self._path = _place(groups, host_name()).file(folder, FAILURE_SUFFIX.removeprefix("."))
        self._groups, self._log, self._resident = groups, log, resident_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            with suppress(OSError):  # a full disk is no reason to hide the error itself
                self._path.parent.mkdir(parents=True, exist_ok=True)
                _write(self._path, self._record(error))

    def _record(self, error: BaseException) -> dict[str, Any]:
        trace = "".join(traceback.format_tb(error.__traceback__))[-MOST_TRACEBACK:]
        common = {
            **_who(_place(self._groups, host_name())),
            "at_ns": time.time_ns(),
            "type": type(error).__name__,
            "message": str(error)[:MOST_MESSAGE],
            "traceback": trace,
            "doing": self._log.doing,
        }
        engine = self.engine
        if engine is None:
            memory = _device_memory(self._groups.device.torch, self._resident) | {"by_kind": {}}
            return common | {"step": 0, "action": "build", "memory": memory, "module": None}
        action = engine.executor.current
        return common | {
            "step": engine.steps_done + 1,
            "module": module_in(error.__traceback__, engine),
            "action": None if action is None else action.kind.name.lower(),
            "chunk": None if action is None else action.chunk,
            "microbatch": None if action is None else action.microbatch,
            "memory": memory_of(engine, self._resident),
        }


class RankRecord:
    """One rank's files. `resident_bytes` is what the process held before the model was built (CPU)."""

    def __init__(self, folder: Path, place: Place, engine: Engine, resident_bytes: int) -> None:
        self._folder, self._place, self._engine = folder, place, engine
        self._resident = resident_bytes
        path = place.file(folder, "jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a" if engine.steps_done else "w", encoding="utf-8")
        self._cpu_s = time.process_time()
        self._line({"kind": "rank", **_who(self._place), "first_step": engine.steps_done})
        self._memory()

    def step(self, step_s: float) -> None:
        """A step is done: what it took, and how long the host was inside collectives of each axis."""
        done, cpu = self._engine.steps_done, time.process_time()
        waited = self._engine.groups.recorder.waited_s()
        line = {
            "kind": "step",
            "step": done,
            "step_s": round(step_s, 7),
            "compute_s": round(max(0.0, step_s - sum(waited.values())), 7),
            "cpu_s": round(cpu - self._cpu_s, 7),
            "waited_s": {axis: round(seconds, 7) for axis, seconds in waited.items()},
        }
        self._cpu_s = cpu
        self._line(line)
        if done <= 2 or done % MEMORY_EVERY == 0:
            self._memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if error is None:
            self._memory()

    def _line(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def _memory(self) -> None:
        record = {**_who(self._place), "step": self._engine.steps_done, **memory_of(self._engine, self._resident)}
        _write(self._place.file(self._folder, "memory.json"), record)


def _who(place: Place) -> dict[str, Any]:
    return {"rank": place.rank, "host": place.host, "coordinates": place.coordinates}


def memory_of(engine: Engine, resident_bytes: int) -> dict[str, Any]:
    """Bytes of this rank. `allocated`, `reserved` and `peak` are torch's on a GPU; on the CPU the resident set and its
    peak, `before` of which the interpreter held. `by_kind` is counted from the tensors themselves."""
    return _device_memory(engine.groups.device.torch, resident_bytes) | {"by_kind": state_bytes(engine)}


def _device_memory(device: torch.device, resident_bytes: int) -> dict[str, Any]:
    if device.type == "cuda":
        return {
            "device": device.type,
            "capacity_bytes": int(torch.cuda.get_device_properties(device).total_memory),
            "allocated_bytes": int(torch.cuda.memory_allocated(device)),
            "reserved_bytes": int(torch.cuda.memory_reserved(device)),
            "peak_bytes": peak_memory_bytes(device),
            "before_bytes": 0,
        }
    now = resident_bytes_now()
    return {
        "device": device.type,
        "allocated_bytes": now,
        "peak_bytes": max(now, peak_memory_bytes(device)),
        "before_bytes": resident_bytes,
    }


def state_bytes(engine: Engine) -> dict[str, int]:
    """Parameters, gradients and optimizer state that this rank stores now (keys as in ledger.MemoryKind)."""
    masters = sum(
        _bytes(p.master) for p in engine.parameters if p.master.data_ptr() != p.local.data_ptr() and p.master.numel()
    )
    state = engine.optimizer.adamw.state.values()
    moments = sum(_bytes(t) for held in state for t in held.values() if isinstance(t, torch.Tensor))
    gradients = [p.gradient if p.gradient is not None else p.live.grad for p in engine.parameters]
    return {
        "parameters": sum(_bytes(p.local) for p in engine.parameters),
        "gradients": sum(_bytes(g) for g in gradients if g is not None),
        "optimizer": masters + moments,
    }


def module_in(at: TracebackType | None, engine: Engine) -> str | None:
    """The innermost module of the model that a traceback passes through, by its name in the whole model."""
    names = {id(m): name for chunk in engine.chunks.values() for name, m in chunk.named_modules() if name}
    found: str | None = None
    while at is not None:
        owner = _owner(at.tb_frame)
        found = names.get(id(owner), found)
        at = at.tb_next
    return found


def _owner(frame: FrameType) -> object:
    return frame.f_locals.get("self")


def resident_bytes_now() -> int:
    """The resident set of this process (its peak where the system does not say)."""
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    return peak_memory_bytes(torch.device("cpu"))


def _bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]
    return local.numel() * local.element_size()


def _write(path: Path, record: dict[str, Any]) -> None:
    write_text(path, json.dumps(record, indent=1) + "\n")
