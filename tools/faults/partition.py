"""A job of 8 ranks on two network namespaces whose cable is pulled: what the doctor says, and that no rank hangs.

In: the fault (its rank takes its machine's end of the cable down) and a folder that both machines reach. Out: the
verdict, and how long ranks lived on. Under torchrun, four ranks on each machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tools.faults.plant import Fault
from tools.namespaces import agents_end

from meshwright.doctor.hang import Verdict, diagnose_hang
from meshwright.errors import InputError
from meshwright.flight import FLIGHT_FOLDER, read_folder
from meshwright.flight.processes import ProcessState, states_of

RANKS_EACH = 4
CABLE = "1gbit"
LIMIT_S = 300.0
POLL_S = 0.2


def run_partition(fault: Fault, folder: Path, arguments: list[str]) -> tuple[Verdict, float, list[str]]:
    """Train by `arguments` of meshwright. The verdict; for how many seconds ranks lived after the last event in any
    log; what else was not as it should be."""
    program = ["-m", "tools.faults.rank", fault.kind, str(fault.rank), str(fault.step), str(folder), *arguments]
    with _last_seen_alive(folder / FLIGHT_FOLDER) as seen:
        codes = agents_end(program, RANKS_EACH, CABLE, folder.parent / f"{folder.name}-logs", LIMIT_S)
    logs = read_folder(folder / FLIGHT_FOLDER)
    states = states_of([log.identity for log in logs])
    wrong = [f"rank {rank} is still there" for rank, state in states.items() if state is not ProcessState.GONE]
    if 0 in codes:
        wrong.append(f"torchrun ended with {codes}")
    return diagnose_hang(folder), seen[-1] - max(log.now.updated_ns for log in logs) / 1e9, wrong


@contextmanager
def _last_seen_alive(flight: Path) -> Iterator[list[float]]:
    """One number: when a rank was last seen alive."""
    seen, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(POLL_S):
            with suppress(InputError):  # logs that are being made
                states = states_of([log.identity for log in read_folder(flight)])
                if any(state is not ProcessState.GONE for state in states.values()):
                    seen[-1] = time.time()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
