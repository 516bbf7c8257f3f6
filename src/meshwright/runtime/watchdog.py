"""A thread in every rank that ends the job when the rank has waited too long in one collective.

In: the rank's flight log and a limit in seconds. Out: the stacks of this machine's ranks and the states of their
processes beside the logs, `on_hang` told on the first rank that noticed, and the exit code HUNG for the launcher
(torchelastic restarts the job; forked ranks are ended by their parent).
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from meshwright.errors import InputError
from meshwright.flight import FLIGHT_FOLDER, FlightLog, read_folder
from meshwright.flight.incident import write_states
from meshwright.flight.processes import ProcessState, states_of

HUNG = 75
"""Exit code of a rank that its watchdog ended (EX_TEMPFAIL: try again)."""
NOTICED_FILE = "noticed"
STACKS_S = 0.5
"""Time given to the other ranks of this machine to write their stacks."""
GRACE_S = 5.0
"""Time that ranks which were not first to notice leave to the one that was."""

OnHang = Callable[[Path], None]


@contextmanager
def watching(log: FlightLog, folder: Path, limit_s: float | None, on_hang: OnHang | None) -> Iterator[None]:
    """Watch this rank inside the block; no limit: only its stack can be asked for (SIGUSR1)."""
    flight = folder / FLIGHT_FOLDER
    stack = (flight / f"rank-{log.identity.rank:05d}.stack").open("w", encoding="utf-8")
    (flight / NOTICED_FILE).unlink(missing_ok=True)
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    over = threading.Event()
    thread = None
    if limit_s is not None:
        thread = threading.Thread(target=_watch, args=(log, flight, limit_s, on_hang, over), daemon=True)
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread is not None:
            thread.join()
        faulthandler.unregister(signal.SIGUSR1)
        stack.close()


def _watch(log: FlightLog, flight: Path, limit_s: float, on_hang: OnHang | None, over: threading.Event) -> None:
    while not over.wait(min(1.0, limit_s / 5)):
        since = log.waiting_since_ns
        if since and time.time_ns() - since > limit_s * 1e9:
            _end(log, flight, on_hang)


def _end(log: FlightLog, flight: Path, on_hang: OnHang | None) -> None:
    try:
        if _is_first(flight):
            _collect(log, flight)
            if on_hang is not None:
                on_hang(flight.parent)
        else:
            time.sleep(GRACE_S)
    finally:
        sys.stderr.flush()
        os._exit(HUNG)


def _is_first(flight: Path) -> bool:
    try:
        os.close(os.open(flight / NOTICED_FILE, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def _collect(log: FlightLog, flight: Path) -> None:
    """Stacks and process states of the ranks of this machine, while they are still there to be asked."""
    try:
        logs = read_folder(flight)
    except InputError:  # a rank that has not written its log yet is a finding for the doctor, not for us
        return
    states = states_of([found.identity for found in logs])
    for found in logs:
        if states[found.identity.rank] is ProcessState.RUNNING:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(found.identity.pid, signal.SIGUSR1)
    time.sleep(STACKS_S)
    write_states(flight, log.identity.rank)
