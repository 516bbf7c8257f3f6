"""A run outlives its ranks: what a SIGKILL leaves behind is enough to end with the losses of an unbroken run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch.distributed as dist
from tools import survival

from meshwright.errors import InputError
from meshwright.runtime import checkpoint
from meshwright.runtime.launch import RankFailedError, run_ranks

from .jobs import run, text


def test_a_run_killed_at_every_kind_of_moment_ends_with_the_unbroken_losses(tmp_path: Path):
    layouts = {"dp2": {"dp": 2, "zero": 1}, "pp2": {"pp": 2}}
    job = survival.Job(tmp_path, text(tmp_path), 24, every=1, layouts=layouts, global_batch=4, seq=16)
    unbroken = survival.finish(job, "dp2", tmp_path / "unbroken")
    kills, survived = survival.survive(job, tmp_path / "killed", len(survival.MOMENTS), seed=3, change_layout=True)
    assert [kill.moment for kill in kills] == list(survival.MOMENTS)
    assert len(survived) == 24
    assert survived[24] < survived[1]
    assert survival.difference(unbroken, survived) < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(600)  # longer than the two limits inside, so that torchrun's log is what a failure shows
@pytest.mark.parametrize("seed", [1, 2])
def test_torchelastic_restarts_a_job_that_lost_a_rank_and_the_losses_are_the_unbroken_ones(tmp_path: Path, seed: int):
    drawn, steps = random.Random(seed), 24
    job = survival.Job(tmp_path, text(tmp_path), steps, 1, {"tp2 dp2": {"tp": 2, "dp": 2, "zero": 1}}, 4, 16)
    unbroken, out = survival.finish(job, "tp2 dp2", tmp_path / "unbroken"), tmp_path / "killed"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += ["--max-restarts", "2", "-m", "meshwright", "train", str(job.plan("tp2 dp2")), "--data", str(job.data)]
    command += ["--out", str(out), "--checkpoint-every", "1", "--keep", "100", "--watchdog", "30"]
    with (tmp_path / "log").open("wb") as log:
        torchrun = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            after = drawn.randint(2, 12)
            until = time.monotonic() + 200
            while max(survival.losses_of(out), default=0) < after:
                alive = torchrun.poll() is None and time.monotonic() < until
                assert alive, (tmp_path / "log").read_text()
                time.sleep(0.01)
            time.sleep(drawn.uniform(0.0, 0.3))
            os.kill(survival.children(torchrun.pid)[drawn.randrange(4)], signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                torchrun.wait(200)
            assert torchrun.returncode == 0, (tmp_path / "log").read_text()
        finally:
            if torchrun.poll() is None:
                torchrun.terminate()
                torchrun.wait(60)  # it ends its ranks, which are in sessions of their own
    starts = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if '"kind": "run"' in line]
    assert len(starts) == 2
    assert int(Path(starts[1]["resumed_from"]).name.removeprefix("step-")) >= after - 1
    assert survival.difference(unbroken, survival.losses_of(out)) == 0


def test_a_checkpoint_that_cannot_be_written_stops_the_run_with_the_reason(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(InputError, match=r"checkpoints: cannot be written by rank 0: .*File exists"):
        run(tmp_path, "run", 3, {"dp": 2}, checkpoint_every=1)


def test_names_of_folders_that_are_not_whole_do_not_count_and_are_cleared_away(tmp_path: Path):
    folder = tmp_path / "run" / "checkpoints"
    for leftover in (".step-00000009.incomplete", ".step-00000001.removed"):
        (folder / leftover).mkdir(parents=True)
        (folder / leftover / checkpoint.STATE_FILE).write_text("{}")
    assert checkpoint.complete(folder) == []
    run(tmp_path, "run", 3, {"dp": 2}, checkpoint_every=1, keep=1)
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000003"]


def one_rank_is_killed() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_the_killed_rank_is_blamed_not_the_peers_that_lost_it():
    with pytest.raises(RankFailedError, match="rank 1 was killed by SIGKILL"):
        run_ranks(3, one_rank_is_killed)
