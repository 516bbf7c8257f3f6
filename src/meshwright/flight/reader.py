"""Read flight logs that anything may have happened to: every number is checked before it is used.

In: a file or a run's folder. Out: `RankLog`s with NumPy records, or an InputError that names the file and the defect.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import InputError
from meshwright.flight.layout import (
    COLLECTIVES,
    HEAD,
    IDENTITY_AT,
    IDENTITY_BYTES,
    MAGIC,
    MOST_RECORDS,
    MOST_STEPS,
    NOW,
    NOW_AT,
    PHASES,
    RECORD,
    STEP,
    STEPS_AT,
    VERSION,
    Group,
    Identity,
    file_bytes,
    records_at,
    unpack_ranks,
)

MOST_RANKS = 1 << 20
SUFFIX = ".flight"


@dataclass(frozen=True)
class Now:
    """What a rank did when its log was read. `waiting_group` is -1 where it waited for nobody."""

    updated_ns: int
    step: int
    chunk: int
    microbatch: int
    waiting_group: int
    waiting_since_ns: int
    peer: int
    activity: str
    action: str


@dataclass(frozen=True)
class RankLog:
    """One rank's log: `records` and `steps` in the order in which they were written, whole ones only."""

    identity: Identity
    now: Now
    records: NDArray[Any]
    steps: NDArray[Any]


def log_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}{SUFFIX}"


def read_folder(folder: Path) -> list[RankLog]:
    """Every log of a run (of its folder `flight`), in rank order. At least one, of one world."""
    paths = sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []
    if not paths:
        raise InputError(f"{folder}: no flight logs here; they are written by meshwright train --out RUN_DIR")
    logs = sorted((read_log(path) for path in paths), key=lambda log: log.identity.rank)
    ranks = [log.identity.rank for log in logs]
    if len(set(ranks)) != len(ranks):
        twice = next(r for r in ranks if ranks.count(r) > 1)
        raise InputError(f"{folder}: two logs say that they are of rank {twice}")
    worlds = sorted({log.identity.world for log in logs})
    if len(worlds) > 1:
        raise InputError(f"{folder}: logs of worlds of {worlds[0]} and {worlds[1]} ranks lie together")
    return logs


def read_log(path: Path) -> RankLog:
    """One log. Torn records are left out."""
    try:
        data = (
            path.read_bytes() if path.is_file() and path.stat().st_size <= file_bytes(MOST_STEPS, MOST_RECORDS) else b""
        )
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) < STEPS_AT or not data.startswith(MAGIC):
        raise InputError(f"{path}: not a flight log")
    _, version, records, steps, length, crc, _ = HEAD.unpack_from(data, 0)
    if version != VERSION:
        raise InputError(f"{path}: flight log of version {version}; this meshwright reads {VERSION}")
    if not (0 < records <= MOST_RECORDS and 0 < steps <= MOST_STEPS and length <= IDENTITY_BYTES):
        raise InputError(f"{path}: a flight log whose sizes are damaged")
    if len(data) != file_bytes(steps, records):
        raise InputError(f"{path}: a flight log of {file_bytes(steps, records)} bytes was cut to {len(data)}")
    text = data[IDENTITY_AT : IDENTITY_AT + length]
    if zlib.crc32(text) != crc:
        raise InputError(f"{path}: a flight log whose identity is damaged")
    identity = _identity(path, text)
    now = _now(data, len(identity.groups))
    ring = np.frombuffer(data, RECORD, records, records_at(steps))
    return RankLog(identity, now, _whole(ring, identity), _steps(np.frombuffer(data, STEP, steps, STEPS_AT)))


def _identity(path: Path, text: bytes) -> Identity:
    try:
        read: dict[str, Any] = json.loads(text)
        rank, world = int(read["rank"]), int(read["world"])
        if not 0 <= rank < world <= MOST_RANKS:
            raise ValueError(f"rank {rank} of a world of {world}")
        groups: Sequence[Any] = read["groups"]
        return Identity(
            rank,
            world,
            {str(axis): int(value) for axis, value in dict(read["coordinates"]).items()},
            str(read["host"]),
            int(read["pid"]),
            int(read["process_start"]),
            str(read["boot"]),
            str(read["digest"]),
            int(read["started_ns"]),
            tuple(Group(str(g["axis"]), unpack_ranks(str(g["ranks"]), world)) for g in groups),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: a flight log whose identity cannot be read ({error})") from None


def _now(data: bytes, groups: int) -> Now:
    updated, step, chunk, microbatch, group, since, peer, activity, action = NOW.unpack_from(data, NOW_AT)
    known = 0 <= group < groups
    return Now(
        *(updated, step, chunk, microbatch, group if known else -1, since if known else 0, peer),
        *(_text(activity), _text(action)),
    )


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode("ascii", "replace")


def _whole(ring: NDArray[Any], identity: Identity) -> NDArray[Any]:
    """Records that were written to their end and mean something, oldest first."""
    whole = (ring["serial"] > 0) & (ring["serial"] == ring["check"]) & (ring["group"] < len(identity.groups))
    whole &= (ring["collective"] < len(COLLECTIVES)) & (ring["phase"] < len(PHASES)) & (ring["peer"] < identity.world)
    return np.sort(ring[whole], order="serial")


def _steps(ring: NDArray[Any]) -> NDArray[Any]:
    whole = (ring["step"] > 0) & (ring["step"] == ring["check"]) & (ring["ended_ns"] >= ring["started_ns"])
    return np.sort(ring[whole], order="step")
