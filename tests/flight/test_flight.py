"""Flight logs: what is written is read, after any death, and nothing damaged is believed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.flight import FlightLog, Identity, read_folder, read_log
from meshwright.flight.incident import clear
from meshwright.flight.layout import RECORD, pack_ranks, records_at, unpack_ranks
from meshwright.flight.reader import log_path
from meshwright.ledger import Collective, Phase


def identity(rank: int = 1, world: int = 8) -> Identity:
    return Identity(rank, world, {"dp": 0, "pp": 0, "tp": rank}, "node-0", os.getpid(), 1, "boot", "abc", 5)


def reduce(log: FlightLog, call_bytes: int = 64) -> None:
    log.issued("tp", (0, 1), Collective.ALL_REDUCE, Phase.FORWARD, "attention output", call_bytes, "float32")


@given(st.integers(1, 40), st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_the_last_records_of_the_ring_are_read_in_order(
    tmp_path_factory: pytest.TempPathFactory, size: int, calls: int
):
    log = FlightLog(tmp_path_factory.mktemp("f") / "a.flight", identity(), records=size)
    for i in range(calls):
        reduce(log, i)
    read = read_log(log.path)
    first = max(0, calls - size)
    assert read.records["bytes"].tolist() == list(range(first, calls))
    assert read.records["sequence"].tolist() == list(range(first + 1, calls + 1))


def test_a_killed_rank_leaves_what_it_waited_for(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        log = FlightLog(log_path(tmp_path, 1), identity())
        log.step_begins(3)
        log.action("B", 0, 2)
        reduce(log)
        log.wait_begins("tp", (0, 1))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (log_read,) = read_folder(tmp_path)
    now = log_read.now
    assert (now.action, now.chunk, now.microbatch, now.step, now.activity) == ("B", 0, 2, 3, "step")
    assert log_read.identity.groups[now.waiting_group].ranks == (0, 1)
    assert log_read.records["returned_ns"].tolist() == [0]


def test_a_wait_that_ends_marks_its_call_returned_and_counts_in_the_step(tmp_path: Path) -> None:
    log = FlightLog(tmp_path / "a.flight", identity())
    log.step_begins(0)
    reduce(log)
    log.wait_begins("tp", (0, 1))
    log.wait_ends()
    log.step_ends()
    log.close()
    read = read_log(log.path)
    assert read.records["returned_ns"][0] >= read.records["issued_ns"][0]
    assert read.steps["step"].tolist() == [1]
    assert 0 < read.steps["waited_ns"][0] <= read.steps["ended_ns"][0] - read.steps["started_ns"][0]
    assert read.now.activity == "ended"


def test_a_torn_record_is_left_out(tmp_path: Path) -> None:
    log = FlightLog(tmp_path / "a.flight", identity(), records=4, steps=2)
    reduce(log)
    reduce(log)
    data = bytearray(log.path.read_bytes())
    at = records_at(2) + 2 * RECORD.itemsize - 1
    data[at] ^= 255
    log.path.write_bytes(data)
    assert read_log(log.path).records["serial"].tolist() == [1]


@given(st.binary(max_size=200), st.integers(0, 70_000))
@settings(max_examples=150, deadline=None)
def test_a_damaged_log_is_refused_or_read_but_never_breaks(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int
) -> None:
    log = FlightLog(tmp_path_factory.mktemp("f") / "a.flight", identity(), records=8, steps=4)
    reduce(log)
    data = bytearray(log.path.read_bytes())
    at %= len(data)
    data[at : at + len(noise)] = noise
    log.path.write_bytes(data)
    assert "\n" not in outcome(log.path)


def outcome(path: Path) -> str:
    """What reading says: '' or the refusal."""
    try:
        read_log(path)
    except InputError as error:
        return str(error)
    return ""


def test_a_folder_without_logs_and_two_logs_of_one_rank_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no flight logs"):
        read_folder(tmp_path)
    FlightLog(tmp_path / "a.flight", identity())
    FlightLog(tmp_path / "b.flight", identity())
    with pytest.raises(InputError, match="rank 1"):
        read_folder(tmp_path)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=12, unique=True))
def test_ranks_of_a_group_survive_packing(ranks: list[int]) -> None:
    assert unpack_ranks(pack_ranks(tuple(ranks)), 100) == tuple(ranks)


def test_a_long_even_group_is_packed_short() -> None:
    assert pack_ranks(tuple(range(3, 4096, 8))) == "3:4092:8"


def test_a_smaller_world_forgets_the_logs_of_ranks_that_it_has_no_more(tmp_path: Path) -> None:
    flight = tmp_path / "flight"
    for rank in range(4):
        FlightLog(log_path(flight, rank), identity(rank, 4)).close()
    clear(tmp_path, 2)
    assert [log.identity.rank for log in read_folder(flight)] == [0, 1]
