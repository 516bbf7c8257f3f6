"""What is there when something went wrong: states of processes beside the logs, and the errors that ranks raised.

Small JSON files, written whole or not at all, read with every field checked.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from meshwright.errors import InputError
from meshwright.files import write_text
from meshwright.flight.layout import FLIGHT_FOLDER
from meshwright.flight.processes import ProcessState, states_of
from meshwright.flight.reader import SUFFIX, read_folder

STATES_FILE = "states.json"
FAILURES_FOLDER, FAILURE_SUFFIX = "ranks", ".error.json"
"""Written by runtime.rank_record, with more in it for `doctor oom`."""
MOST_TEXT = 4000
MOST_BYTES = 1 << 24


@dataclass(frozen=True)
class Failure:
    """An exception that ended a rank. `doing`: the activity under way."""

    rank: int
    at_ns: int
    kind: str
    message: str
    doing: str


def read_failures(run: Path) -> list[Failure]:
    """Of a run's folder, in the order in which they happened."""
    found: list[Failure] = []
    for path in sorted((run / FAILURES_FOLDER).glob(f"*{FAILURE_SUFFIX}")):
        record = _read(path)
        try:
            texts = [str(record[key])[:MOST_TEXT] for key in ("type", "message", "doing")]
            found.append(Failure(int(record["rank"]), int(record["at_ns"]), *texts))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: the record of a failure that cannot be read ({error})") from None
    return sorted(found, key=lambda failure: failure.at_ns)


def write_states(flight: Path, noticed_by: int, first_only: bool = False) -> None:
    """The states of the ranks on this machine now. `first_only`: unless somebody has noticed before."""
    path = flight / STATES_FILE
    if first_only and path.exists():
        return
    try:
        logs = read_folder(flight)
    except InputError:  # a rank that has not written its log yet is a finding for the doctor
        return
    states = states_of([log.identity for log in logs])
    record = {"noticed_by": noticed_by, "at_ns": time.time_ns(), "states": {str(r): s.value for r, s in states.items()}}
    write_text(path, json.dumps(record) + "\n")


def read_states(flight: Path) -> tuple[dict[int, ProcessState], int] | None:
    """States by rank and when they were taken (ns), or None where nobody took them."""
    path = flight / STATES_FILE
    if not path.exists():
        return None
    record = _read(path)
    try:
        states = {int(rank): ProcessState(state) for rank, state in dict(record["states"]).items()}
        return states, int(record["at_ns"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: states of processes that cannot be read ({error})") from None


def clear(run: Path, world: int) -> None:
    """Forget the incident of the run before, and the logs of ranks that a smaller world has no more. Called by every
    rank before its log is opened."""
    failures = (run / FAILURES_FOLDER).glob(f"*{FAILURE_SUFFIX}")
    logs = (run / FLIGHT_FOLDER).glob(f"rank-{'[0-9]' * 5}{SUFFIX}")
    gone = [path for path in logs if int(path.stem.removeprefix("rank-")) >= world]
    for path in (*failures, *gone, run / FLIGHT_FOLDER / STATES_FILE):
        path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: larger than any record of an incident")
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(read, dict):
        raise InputError(f"{path}: holds no record of an incident")
    return cast(dict[str, Any], read)
