"""What an out-of-memory error says: who was refused how many bytes, by whom, and what was free but in pieces.

In: the text of an exception or what the launcher saw of a killed rank. Out: `Refusal`, or None where it is about
something else. Texts are PyTorch's (c10/cuda/CUDACachingAllocator.cpp, c10/core/CPUAllocator.cpp) and Python's.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass

from meshwright.doctor.run_records import LauncherNote

UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = r"([0-9]{1,18}(?:\.[0-9]{1,6})?) (bytes|[KMGT]iB|B)\b"
_TRIED = re.compile(r"[Tt]ried to allocate " + _SIZE)
_CAPACITY = re.compile(r"total capacity of " + _SIZE)
_FREE = re.compile(r"of which " + _SIZE + " is free")
_ALLOCATED = re.compile(_SIZE + r" is allocated by PyTorch")
_UNUSED = re.compile(_SIZE + r" is reserved by PyTorch but unallocated")


@dataclass(frozen=True)
class Refusal:
    """`by`: 'GPU', 'CPU', or 'kernel' (the process was killed). Bytes are None where the text does not say."""

    by: str
    requested_bytes: int | None = None
    capacity_bytes: int | None = None
    free_bytes: int | None = None
    allocated_bytes: int | None = None
    unused_bytes: int | None = None

    @property
    def fragmented(self) -> bool:
        """Whether what the allocator holds unused would have been enough, had it been in one piece."""
        return bool(self.requested_bytes and self.unused_bytes and self.unused_bytes >= self.requested_bytes)


def refusal_in(kind: str, message: str) -> Refusal | None:
    """What an exception of a type with a message says about memory."""
    found = {
        name: _bytes(pattern, message)
        for name, pattern in (
            ("requested_bytes", _TRIED),
            ("capacity_bytes", _CAPACITY),
            ("free_bytes", _FREE),
            ("allocated_bytes", _ALLOCATED),
            ("unused_bytes", _UNUSED),
        )
    }
    if "out of memory" in message and ("CUDA" in message or "HIP" in message or "GPU" in message):
        return Refusal("GPU", **found)
    if kind == "OutOfMemoryError":
        return Refusal("GPU", **found)
    if "can't allocate memory" in message or "not enough memory" in message:
        return Refusal("CPU", requested_bytes=found["requested_bytes"])
    if kind in ("MemoryError", "_ArrayMemoryError"):
        return Refusal("CPU", requested_bytes=found["requested_bytes"])
    return None


def refusal_of_kill(note: LauncherNote) -> Refusal | None:
    """Whether a rank that died by SIGKILL was the kernel's to kill: its count of such kills grew meanwhile."""
    return Refusal("kernel") if note.exit_code == -signal.SIGKILL and note.oom_kills else None


def _bytes(pattern: re.Pattern[str], text: str) -> int | None:
    match = pattern.search(text)
    return None if match is None else int(float(match.group(1)) * UNITS[match.group(2)])
