"""A job that stands still is ended by its watchdog, and the doctor names the rank that all wait for."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from meshwright.doctor.hang import Cause, Verdict, diagnose_hang
from meshwright.flight import FLIGHT_FOLDER, read_folder
from meshwright.runtime import trainer
from meshwright.runtime.launch import RankFailedError
from meshwright.runtime.trainer import Trainer, train_forked
from meshwright.runtime.watchdog import HUNG

from .jobs import job

LAYOUT = {"dp": 1, "pp": 2, "tp": 2, "global_batch": 4}
CULPRIT, STEP = 2, 3


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ValueError("no such row")


def at_the_fault(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """The culprit does `act` instead of beginning its step."""
    whole = Trainer.step

    def step(self: Trainer) -> Any:
        if dist.get_rank() == CULPRIT and self.engine.steps_done == STEP:
            act()
        return whole(self)

    monkeypatch.setattr(trainer.Trainer, "step", step)


def verdict_of(folder: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> tuple[Verdict, int | None]:
    at_the_fault(monkeypatch, act)
    with pytest.raises(RankFailedError) as failed:
        train_forked(job(folder, "run", 8, LAYOUT, watchdog_s=2.0))
    return diagnose_hang(folder / "run"), failed.value.exit_code


@pytest.mark.parametrize(
    ("act", "cause"), [(lambda: time.sleep(600), Cause.WAITED_FOR), (stop, Cause.STOPPED)], ids=["sleeps", "stopped"]
)
def test_the_rank_that_does_not_come_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any], cause: Cause
) -> None:
    verdict, code = verdict_of(tmp_path, monkeypatch, act)
    assert (verdict.cause, verdict.ranks) == (cause, (CULPRIT,))
    assert code == HUNG
    assert verdict.behind_s is not None
    assert 2.0 <= verdict.behind_s < 12.0


def test_a_rank_that_is_killed_is_named_without_waiting_for_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict, _ = verdict_of(tmp_path, monkeypatch, kill)
    assert (verdict.cause, verdict.ranks) == (Cause.DEAD, (CULPRIT,))


def test_the_rank_that_raised_is_named_and_not_those_that_lost_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict, _ = verdict_of(tmp_path, monkeypatch, fail)
    assert (verdict.cause, verdict.ranks) == (Cause.FAILED, (CULPRIT,))
    assert "no such row" in verdict.sentence


def test_a_job_that_ends_leaves_logs_that_show_it(tmp_path: Path) -> None:
    train_forked(job(tmp_path, "run", 3, LAYOUT, watchdog_s=60.0))
    logs = read_folder(tmp_path / "run" / FLIGHT_FOLDER)
    assert [log.now.activity for log in logs] == ["ended"] * 4
    assert all(log.steps["step"].tolist() == [1, 2, 3] for log in logs)
    assert diagnose_hang(tmp_path / "run").cause in (Cause.NOTHING, Cause.SLOW)
