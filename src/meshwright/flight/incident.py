"""What ranks leave beside their logs when something goes wrong: states of processes, and the errors that ranks raised.

Small JSON files, written whole or not at all, read with every field checked.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from meshwright.errors import InputError
from meshwright.files import write_text
from meshwright.flight.processes import ProcessState, states_of
from meshwright.flight.reader import read_folder

STATES_FILE = "states.json"
FAILURE_SUFFIX = ".failure.json"
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


def write_failure(flight: Path, failure: Failure) -> None:
    record = asdict(failure) | {"message": failure.message[:MOST_TEXT]}
    write_text(flight / f"rank-{failure.rank:05d}{FAILURE_SUFFIX}", json.dumps(record) + "\n")


def read_failures(flight: Path) -> list[Failure]:
    """In the order in which they happened."""
    found: list[Failure] = []
    for path in sorted(flight.glob(f"*{FAILURE_SUFFIX}")):
        record = _read(path)
        try:
            texts = [str(record[key])[:MOST_TEXT] for key in ("kind", "message", "doing")]
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


def clear(flight: Path) -> None:
    """Forget the incident of the run before. Called by every rank before its log is opened."""
    for path in (*flight.glob(f"*{FAILURE_SUFFIX}"), flight / STATES_FILE):
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
