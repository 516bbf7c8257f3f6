"""Launch, wait, report, load and stop, against a small server process that speaks as vLLM does."""

from __future__ import annotations

import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig
from meshwright.serving import VllmProcess, server
from meshwright.serving.client import AnswerError, Completion, complete, is_healthy, stream
from meshwright.serving.failures import KNOWN, explain
from meshwright.serving.load import End, LoadPlan, percentiles, run_load
from meshwright.serving.ranks import expected_ranks, reported_cache, reported_ranks
from meshwright.serving.server import ServerFailedError, ServerState, VllmServer, session_members

FAKE = Path(__file__).with_name("fake_vllm.py")
TP2 = HybridParallelConfig(tp=2)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextmanager
def running(folder: Path, model: str = "tiny", port: int | None = None) -> Iterator[VllmServer]:
    executable = folder / "vllm"
    executable.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    executable.chmod(executable.stat().st_mode | stat.S_IXUSR)
    process = VllmProcess(0, 0, model, {"host": "127.0.0.1", "port": port or free_port()})
    with VllmServer(process, str(executable), folder / "out", {}) as started:
        started.wait(30.0, lambda _seconds, _line: None)
        yield started


def load(**changes: object) -> LoadPlan:
    values = {"model": "tiny", "prompt_tokens": 5, "new_tokens": 12, "vocabulary": 90, "requests": 60,
              "seconds": 30.0, "clients": 32} | changes  # fmt: skip
    return LoadPlan(**values)  # pyright: ignore[reportArgumentType]


def test_a_server_is_reported_and_stopped_with_its_children(tmp_path: Path):
    with running(tmp_path) as started:
        state = ServerState.read(tmp_path / "out")
        assert (state.url, state.model, state.pid) == (started.url, "tiny", started.pid)
        members = session_members(started.pid)
        assert len(members) == 2  # itself and its child
        session = started.pid
        log = started.log.read_text()
        assert reported_ranks(log, TP2) == expected_ranks(TP2)
        cache = reported_cache(log)
        assert cache is not None
        assert (cache.tokens, cache.concurrency) == (4096, 64.0)
    assert session_members(session) == []
    assert not is_healthy(started.url)
    with pytest.raises(InputError, match="no server is running"):
        ServerState.read(tmp_path / "out")


def test_a_server_that_ignores_interrupts_is_ended_harder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server, "INTERRUPT_S", 0.3)
    with running(tmp_path, "stubborn") as started:
        session = started.pid
    assert session_members(session) == []


def test_a_port_that_answers_already_is_refused(tmp_path: Path):
    with (
        running(tmp_path) as started,
        pytest.raises(InputError, match="another server"),
        VllmServer(started.process, "vllm", tmp_path / "second", {}),
    ):
        pass


def test_a_start_that_fails_is_told_with_cause_remedy_and_lines(tmp_path: Path):
    with pytest.raises(ServerFailedError, match="exit code 1") as raised, running(tmp_path, "too-big"):
        pass
    failure = explain(raised.value.log.read_text())
    assert "no room" in failure.cause
    assert "max_len" in failure.remedy
    assert "No available memory" in failure.lines[0]


def test_an_unknown_failure_shows_the_last_errors():
    log = "\n".join(["INFO fine"] * 50 + ["ERROR something odd", "RuntimeError: odd"])
    assert explain(log).lines == ("ERROR something odd", "RuntimeError: odd")
    assert len({k.cause for k in KNOWN}) == len(KNOWN)


def test_answers_whole_and_streamed_are_the_same_and_errors_are_told(tmp_path: Path):
    with running(tmp_path) as started:
        request = Completion("tiny", [3, 4], 6)
        whole = complete(started.url, request)
        assert whole == (7, 8, 9, 10, 11, 12)
        assert tuple(t for _, new in stream(started.url, request) for t in new) == whole
        with pytest.raises(AnswerError, match="no such prompt"):
            complete(started.url, Completion("tiny", [0], 2))
        with pytest.raises(AnswerError, match=r"before \[DONE\]"):
            list(stream(started.url, Completion("tiny", [1], 2)))
    with pytest.raises(AnswerError, match="connection broke"):
        complete(started.url, request)


def test_32_clients_with_disconnects_are_all_accounted_for(tmp_path: Path):
    with running(tmp_path) as started:
        report = run_load(started.url, load(leave=0.4))
        assert report.accounted_for
        assert report.asked == len(report.answers) == 60
        ends = report.ends
        assert ends[End.COMPLETE] + ends[End.LEFT] == 60
        assert ends[End.LEFT] > 5
        assert all(a.tokens == 12 for a in report.answers if a.end is End.COMPLETE)
        assert all(0 < a.tokens < 12 for a in report.answers if a.end is End.LEFT)
        assert set(report.ttft_s()) == set(report.tpot_s()) == {50, 90, 99}
        assert report.tpot_s()[50] >= 0.0015


def test_an_open_loop_keeps_its_rate_and_its_end(tmp_path: Path):
    with running(tmp_path) as started:
        report = run_load(started.url, load(requests=20, rate=40.0))
        assert report.asked == 20
        assert 0.1 < report.seconds < 10
        bounded = run_load(started.url, load(requests=1000, rate=20.0, seconds=0.5))
        assert 0 < bounded.asked < 100
        assert bounded.accounted_for


def test_a_load_on_a_server_that_is_gone_counts_failures(tmp_path: Path):
    with running(tmp_path) as started:
        url = started.url
    report = run_load(url, load(requests=4, clients=2))
    assert not report.accounted_for
    assert report.ends[End.FAILED] == 4
    assert "connection" in report.reasons[0]


def test_percentiles_are_the_nearest_rank():
    assert percentiles([float(v) for v in range(1, 101)]) == {50: 50.0, 90: 90.0, 99: 99.0}
    assert percentiles([2.0]) == {50: 2.0, 90: 2.0, 99: 2.0}
    assert percentiles([]) == {}


@pytest.mark.parametrize("sizes", [{"tp": 2, "pp": 2}, {"dp": 2, "tp": 2}, {"pp": 4}])
def test_ranks_are_read_from_workers_names(sizes: dict[str, int]):
    config = HybridParallelConfig(**sizes)
    lines: list[str] = []
    for place in expected_ranks(config):
        named = "".join(f"_{a.upper()}{getattr(place, a)}" for a in ("dp", "pp", "tp") if getattr(config, a) > 1)
        rank = place.rank % (config.pp * config.tp)  # each replica counts from 0
        lines += [f"(Worker pid={500 + place.rank}) INFO world_size=9 rank={rank} local_rank=0 x"]
        lines += [f"(Worker{named} pid={500 + place.rank}) INFO loading"]
    assert reported_ranks("\n".join(lines), config) == expected_ranks(config)
    assert reported_ranks("\n".join(lines[:-2]), config) != expected_ranks(config)


def test_replicas_of_a_dense_model_are_worlds_of_their_own():
    """As vLLM 0.32 logs dp2: no worker says which replica it is of."""
    lines = [f"(Worker pid={pid}) INFO world_size=1 rank=0 local_rank=0 x" for pid in (10, 11)]
    assert reported_ranks("\n".join(lines), HybridParallelConfig(dp=2)) == expected_ranks(HybridParallelConfig(dp=2))
    assert reported_ranks(lines[0], HybridParallelConfig(dp=2)) != expected_ranks(HybridParallelConfig(dp=2))


def test_the_state_of_a_server_that_is_damaged_is_refused(tmp_path: Path):
    (tmp_path / "server.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        ServerState.read(tmp_path)
    assert os.listdir(tmp_path) == ["server.json"]
