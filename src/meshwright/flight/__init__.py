"""The flight log: what every rank of a job did last, in a file that survives kill -9 (docs/doctor.md).

One file per rank, of fixed size, mapped into memory: who the rank is, what it does now, its last steps, and a ring of
its last collectives. `writer` is used inside ranks, `reader` by the doctor; `layout` is the form they share. No torch.
"""

from meshwright.flight.layout import FLIGHT_FOLDER, Group, Identity
from meshwright.flight.reader import RankLog, read_folder, read_log
from meshwright.flight.writer import FlightLog

__all__ = ["FLIGHT_FOLDER", "FlightLog", "Group", "Identity", "RankLog", "read_folder", "read_log"]
