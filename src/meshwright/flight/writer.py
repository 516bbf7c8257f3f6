"""Write a rank's flight log: a few stores into mapped memory per collective, nothing that can block.

In: the identity of the rank and a path. Out: a file of fixed size that is readable at any moment, also after SIGKILL
(the kernel owns the pages), though not after a power cut.
"""

from __future__ import annotations

import json
import mmap
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from meshwright.flight.layout import (
    COLLECTIVES,
    ENDED,
    HEAD,
    IDENTITY_AT,
    IDENTITY_BYTES,
    MAGIC,
    NOW,
    NOW_AT,
    PHASES,
    RECORD_STRUCT,
    STARTING,
    STEP_STRUCT,
    STEPPING,
    STEPS_AT,
    VERSION,
    Group,
    Identity,
    file_bytes,
    pack_ranks,
    records_at,
)
from meshwright.ledger import Collective, Phase

RETURNED = 24
"""Offset of `returned_ns` in a record."""
COLLECTIVE_CODES = {c: i for i, c in enumerate(COLLECTIVES)}
PHASE_CODES = {p: i for i, p in enumerate(PHASES)}
NOBODY = -1


class FlightLog:
    """One rank's log. The rank's main thread writes; a watchdog thread may read `waiting_since_ns`."""

    def __init__(self, path: Path, identity: Identity, records: int = 2048, steps: int = 256) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.identity = identity
        self._records, self._steps = records, steps
        self._ring_at = records_at(steps)
        with path.open("wb+") as file:
            file.truncate(file_bytes(steps, records))
            self._map = mmap.mmap(file.fileno(), 0)
        self._serial = 0
        self._step = 0
        self._step_count = 0
        self._step_started = 0
        self._waited = 0
        self._action, self._chunk, self._microbatch = b"", NOBODY, NOBODY
        self._activity = self._before = STARTING.encode()
        self._waited_group, self._peer = NOBODY, NOBODY
        self.waiting_since_ns = 0
        self._groups: dict[tuple[int, ...], int] = {}
        self._sequences: dict[tuple[int, int], int] = {}
        self._last_at: dict[int, int] = {}  # group -> offset of its last record
        self._identify()
        self._now(time.time_ns())

    def group(self, axis: str, ranks: tuple[int, ...]) -> int:
        """The number of a group; it enters the identity when it is first used."""
        index = self._groups.get(ranks)
        if index is None:
            index = self._groups[ranks] = len(self._groups)
            self.identity = replace(self.identity, groups=(*self.identity.groups, Group(axis, ranks)))
            self._identify()
        return index

    def issued(
        self,
        axis: str,
        ranks: tuple[int, ...],
        collective: Collective,
        phase: Phase,
        what: str,
        call_bytes: int,
        dtype: str,
        peer: int = NOBODY,
    ) -> None:
        """A collective or message is about to be called."""
        group = self._groups.get(ranks)
        if group is None:
            group = self.group(axis, ranks)
        code = COLLECTIVE_CODES[collective]
        channel = (group, NOBODY if peer < 0 else 2 * peer + (collective is Collective.SEND))
        sequence = self._sequences[channel] = self._sequences.get(channel, 0) + 1
        serial = self._serial = self._serial + 1
        at = self._ring_at + (serial - 1) % self._records * RECORD_STRUCT.size
        self._last_at[group] = at
        RECORD_STRUCT.pack_into(
            *(self._map, at, serial, sequence, time.time_ns(), 0, call_bytes, self._step, group, code),
            *(PHASE_CODES[phase], self._microbatch, self._chunk, peer, self._action),
            *(dtype.encode(), what.encode(), serial),
        )

    def wait_begins(self, axis: str, ranks: tuple[int, ...], peer: int = NOBODY) -> None:
        """The host is about to block on a group; `peer`: on a message from that rank."""
        now = time.time_ns()
        self._waited_group, self._peer, self.waiting_since_ns = self.group(axis, ranks), peer, now
        self._now(now)

    def wait_ends(self) -> None:
        """It goes on: the group's last call has returned."""
        now = time.time_ns()
        self._waited += now - self.waiting_since_ns
        at = self._last_at.get(self._waited_group)
        if at is not None:
            self._map[at + RETURNED : at + RETURNED + 8] = now.to_bytes(8, "little")
        self._waited_group, self._peer, self.waiting_since_ns = NOBODY, NOBODY, 0
        self._now(now)

    def action(self, kind: str, chunk: int, microbatch: int) -> None:
        """An action of the schedule begins ('' when the last has ended)."""
        self._action, self._chunk, self._microbatch = kind.encode(), chunk, microbatch
        self._now(time.time_ns())

    def activity(self, name: str) -> None:
        """What the rank does between steps: 'start', 'step', 'checkpoint', 'ended', 'failed'."""
        self._activity = name.encode()
        self._now(time.time_ns())

    @property
    def doing(self) -> str:
        """The activity under way, for an error message: 'step', 'checkpoint', ..."""
        return self._before.decode() if self._map.closed else self._activity.decode()

    def step_begins(self, done: int) -> None:
        self._step, self._step_started, self._waited = done, time.time_ns(), 0
        self.activity(STEPPING)

    def step_ends(self) -> None:
        now = time.time_ns()
        at = STEPS_AT + self._step_count % self._steps * STEP_STRUCT.size
        self._step_count += 1
        STEP_STRUCT.pack_into(self._map, at, self._step + 1, self._step + 1, self._step_started, now, self._waited)
        self._step += 1
        self.action("", NOBODY, NOBODY)

    def close(self, activity: str = ENDED) -> None:
        if not self._map.closed:
            self._before = self._activity
            self.activity(activity)
            self._map.close()

    def _now(self, now: int) -> None:
        NOW.pack_into(
            *(self._map, NOW_AT, now, self._step, self._chunk, self._microbatch, self._waited_group),
            *(self.waiting_since_ns, self._peer, self._activity, self._action),
        )

    def _identify(self) -> None:
        text = identity_json(self.identity)
        if len(text) > IDENTITY_BYTES:
            raise ValueError(f"the groups of rank {self.identity.rank} take {len(text)} bytes, over {IDENTITY_BYTES}")
        self._map[IDENTITY_AT : IDENTITY_AT + len(text)] = text
        head = (MAGIC, VERSION, self._records, self._steps, len(text), zlib.crc32(text), 0)
        HEAD.pack_into(self._map, 0, *head)


def identity_json(identity: Identity) -> bytes:
    packed: Sequence[dict[str, str]] = [{"axis": g.axis, "ranks": pack_ranks(g.ranks)} for g in identity.groups]
    return json.dumps(asdict(identity) | {"groups": packed}).encode()
