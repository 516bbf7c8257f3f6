"""What the kernel says of a rank's process: alive, stopped, gone. Linux only; elsewhere nothing is known.

In: an identity. Out: a state, for ranks of this machine since its last start.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from meshwright.flight.layout import Identity


class ProcessState(StrEnum):
    RUNNING = "running"
    STOPPED = "stopped"  # SIGSTOP, or a debugger
    GONE = "gone"
    UNKNOWN = "unknown"  # of another machine


def boot_id() -> str:
    """Tells this start of this machine from all others ('' where the system does not say)."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="ascii").strip() if path.exists() else ""


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on (proc(5)), None where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def process_start(pid: int) -> int | None:
    """Clock ticks after boot at which a process began."""
    fields = _stat(pid)
    return int(fields[19]) if fields and len(fields) > 19 else None


def state_of(identity: Identity, boot: str) -> ProcessState:
    """The state now of the process that wrote a log. `boot` is `boot_id()` of this machine."""
    if not boot or identity.boot != boot:
        return ProcessState.UNKNOWN
    fields = _stat(identity.pid)
    if fields is None or len(fields) < 20 or int(fields[19]) != identity.process_start or fields[0] in "ZX":
        return ProcessState.GONE
    return ProcessState.STOPPED if fields[0] in "Tt" else ProcessState.RUNNING


def states_of(identities: Sequence[Identity]) -> dict[int, ProcessState]:
    """By rank."""
    boot = boot_id()
    return {i.rank: state_of(i, boot) for i in identities}
