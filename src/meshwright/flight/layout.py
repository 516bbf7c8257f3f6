"""The form of a flight log: fixed-size parts at fixed places, so that a file cut off at any moment can be read.

    0       magic, version, sizes, length and checksum of the identity
    64      what the rank does now (`NOW`)
    256     identity as JSON: rank, coordinates, host, process, plan digest, groups (at most IDENTITY_BYTES)
    ...     ring of steps (`STEP`), then ring of collectives (`RECORD`)

A record carries its serial number at both ends: they differ where it was cut off while being written.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from meshwright.ledger import Collective, Phase

FLIGHT_FOLDER = "flight"
"""Where a run's folder keeps its logs."""
MAGIC = b"MWFLIGHT"
VERSION = 1

HEAD = struct.Struct("<8sIIIIII")  # magic, version, records, steps, identity bytes, identity crc, spare
NOW = struct.Struct(
    "<QIiiiQi16s4s"
)  # updated, step, chunk, microbatch, waited-for group, since, peer, activity, action
NOW_AT, IDENTITY_AT = 64, 256
IDENTITY_BYTES = 64 * 1024
STEPS_AT = IDENTITY_AT + IDENTITY_BYTES
MOST_STEPS, MOST_RECORDS = 4096, 1 << 20

STEP_STRUCT = struct.Struct("<IIQQQ")
STEP = np.dtype([("step", "<u4"), ("check", "<u4"), ("started_ns", "<u8"), ("ended_ns", "<u8"), ("waited_ns", "<u8")])
RECORD_STRUCT = struct.Struct("<QQQQQIHBBiii4s12s44sQ")
RECORD = np.dtype(
    [
        ("serial", "<u8"),  # of this rank, from 1
        ("sequence", "<u8"),  # of this rank in the group (messages: from or to the peer), from 1
        ("issued_ns", "<u8"),
        (
            "returned_ns",
            "<u8",
        ),  # the call came back to the host (0: not yet); an asynchronous one may still be under way
        ("bytes", "<u8"),
        ("step", "<u4"),  # steps done when it was issued
        ("group", "<u2"),  # number in the identity's list of groups
        ("collective", "u1"),
        ("phase", "u1"),
        ("microbatch", "<i4"),  # -1: outside the schedule
        ("chunk", "<i4"),
        ("peer", "<i4"),  # global rank at the other end of a message, -1 for collectives
        ("action", "S4"),
        ("dtype", "S12"),
        ("what", "S44"),
        ("check", "<u8"),
    ]
)
assert RECORD.itemsize == RECORD_STRUCT.size
assert STEP.itemsize == STEP_STRUCT.size

COLLECTIVES = tuple(Collective)
PHASES = tuple(Phase)
MESSAGES = (Collective.SEND, Collective.RECEIVE)
MESSAGE_CODES = tuple(COLLECTIVES.index(c) for c in MESSAGES)

ENDED, FAILED, STEPPING, STARTING, SAVING = "ended", "failed", "step", "start", "checkpoint"
"""Activities of a rank outside its schedule's actions."""


def records_at(steps: int) -> int:
    return STEPS_AT + steps * STEP.itemsize


def file_bytes(steps: int, records: int) -> int:
    return records_at(steps) + records * RECORD.itemsize


@dataclass(frozen=True)
class Group:
    """Ranks that communicate on an axis, in axis order."""

    axis: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Identity:
    """Who wrote a log. `process_start` (clock ticks since boot) tells a process from a later one of the same pid."""

    rank: int
    world: int
    coordinates: dict[str, int]
    host: str
    pid: int
    process_start: int
    boot: str
    digest: str
    started_ns: int
    groups: tuple[Group, ...] = ()


def pack_ranks(ranks: tuple[int, ...]) -> str:
    """'0:4096:8' for evenly spaced ranks, '0,3,4' for others: groups of thousands of ranks stay short."""
    if len(ranks) > 2:
        stride = ranks[1] - ranks[0]
        if stride > 0 and ranks == tuple(range(ranks[0], ranks[-1] + 1, stride)):
            return f"{ranks[0]}:{ranks[-1] + 1}:{stride}"
    return ",".join(str(r) for r in ranks)


def unpack_ranks(text: str, world: int) -> tuple[int, ...]:
    """The ranks of `pack_ranks`; ValueError where they are not distinct ranks of the world."""
    if ":" in text:
        start, stop, stride = (int(part) for part in text.split(":"))
        if not (0 <= start < stop <= world and stride > 0):
            raise ValueError(f"ranks {text!r} are not of a world of {world}")
        return tuple(range(start, stop, stride))
    ranks = tuple(int(part) for part in text.split(","))
    if len(set(ranks)) != len(ranks) or not all(0 <= r < world for r in ranks):
        raise ValueError(f"ranks {text!r} are not distinct ranks of a world of {world}")
    return ranks
