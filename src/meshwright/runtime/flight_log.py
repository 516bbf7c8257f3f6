"""A rank's flight log while it runs: opened when its groups exist, closed with how it ended.

In: the run's folder and the groups. Out: a `FlightLog` of every collective, wait and action; where the rank failed also
the states of this machine's ranks at that moment.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from meshwright.flight import FLIGHT_FOLDER, FlightLog, Identity
from meshwright.flight.incident import write_states
from meshwright.flight.layout import FAILED
from meshwright.flight.processes import boot_id, process_start
from meshwright.flight.reader import log_path
from meshwright.runtime.launch import host_name
from meshwright.runtime.process_groups import ProcessGroupManager


@contextmanager
def flying(folder: Path, groups: ProcessGroupManager, digest: str) -> Iterator[FlightLog]:
    """The log of this rank, known to the recorder of its groups."""
    coordinates = {axis: int(value[0]) for axis, value in groups.layout.coordinates([groups.rank]).items()}
    who = Identity(
        groups.rank,
        groups.config.world_size,
        coordinates,
        host_name(),
        os.getpid(),
        process_start(os.getpid()) or 0,
        boot_id(),
        digest,
        time.time_ns(),
    )
    log = FlightLog(log_path(folder / FLIGHT_FOLDER, groups.rank), who)
    groups.recorder.flight = log
    try:
        yield log
    except BaseException:
        log.close(FAILED)
        with suppress(OSError):  # a full disk is no reason to hide the error itself
            write_states(folder / FLIGHT_FOLDER, groups.rank, first_only=True)
        raise
    else:
        log.close()
    finally:
        groups.recorder.flight = None
