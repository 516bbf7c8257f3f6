"""`train --replan`: the layout for the ranks that are left, and a run that goes on with fewer of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.commands.replan import replanned
from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig, Schedule
from meshwright.plan import Plan, TrainingRun, TrainingWorkload

from .jobs import plan as tiny_plan
from .jobs import text
from .tiny import tiny


def big(**changes: object) -> Plan:
    layout = {"dp": 8, "tp": 4, "pp": 2, "zero": 1, "sequence_parallel": True, "global_batch": 64}
    config = HybridParallelConfig(**(layout | changes))  # type: ignore[arg-type]
    workload = TrainingWorkload(seq=4096)
    return Plan.from_parts("llama-3.1-8b", config, workload, "h100-sxm", training=TrainingRun(steps=7))


@pytest.mark.parametrize("ranks", [32, 56, 4])
def test_the_ranks_left_get_a_layout_of_their_number_and_everything_else_stays(ranks: int):
    before = big(global_batch=56 * 8)
    after, line = replanned(before, ranks)
    assert after.parallel.world_size == after.load_cluster().gpus == ranks
    assert after.parallel.global_batch == before.parallel.global_batch
    assert after.parallel.cp == 1
    assert after.parallel.schedule is not Schedule.GPIPE
    assert (after.model, after.workload, after.training) == (before.model, before.workload, before.training)
    assert f"the plan has 64 ranks, {ranks} were started" in line
    assert len(line.splitlines()) == 1


def test_schedules_with_a_split_backward_pass_are_chosen_where_they_are_faster():
    config = HybridParallelConfig(dp=4, tp=8, pp=4, zero=1, sequence_parallel=True, global_batch=128)
    before = Plan.from_parts("llama-3.1-70b", config, TrainingWorkload(seq=4096), "h100-sxm")
    after, line = replanned(before, 96)
    assert after.parallel.schedule in (Schedule.ZB_H1, Schedule.ZBV, Schedule.DUALPIPEV)
    assert f", {after.parallel.schedule.value}, " in line


def test_a_model_with_experts_keeps_its_micro_batch_and_gets_no_stages():
    before = replace(big().parallel, pp=1, tp=1, dp=64, ep=8, micro_batch=1, sequence_parallel=False, zero=3)
    after, _ = replanned(Plan.from_parts("mixtral-8x7b", before, TrainingWorkload(seq=4096), "h100-sxm"), 32)
    assert (after.parallel.pp, after.parallel.micro_batch) == (1, 1)


def test_ranks_without_room_for_the_model_are_refused():
    config = HybridParallelConfig(dp=8, tp=8, global_batch=64)
    with pytest.raises(InputError, match="no layout of 1 ranks leaves the model room"):
        replanned(Plan.from_parts("llama-3.1-70b", config, TrainingWorkload(seq=4096), "h100-sxm"), 1)


def torchrun(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Train under torchrun with a rendezvous of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command += ["-m", "meshwright", "train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=env, check=False)


@pytest.mark.slow
def test_a_run_of_four_ranks_goes_on_with_two_under_torchrun(tmp_path: Path):
    tiny_plan(tiny(vocab=264), 4, tp=2, dp=2, zero=1).write(tmp_path / "plan.yaml")
    common = (tmp_path / "plan.yaml", "--data", text(tmp_path), "--out", tmp_path / "run")
    first = torchrun(4, *common, "--steps", 2)
    assert first.returncode == 0, first.stderr
    refused = torchrun(2, *common, "--resume")
    assert "= 4 ranks, but 2 were started" in refused.stderr
    again = torchrun(2, *common, "--replan")
    assert again.returncode == 0, again.stderr
    assert "replan: the plan has 4 ranks, 2 were started: " in again.stderr
    assert "; from step-00000002" in again.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4]
    assert [line["ranks"] for line in lines if line["kind"] == "run"] == [4, 2]


def test_replan_without_torchrun_says_what_is_missing(meshwright, tmp_path: Path):  # type: ignore[no-untyped-def]
    tiny_plan(tiny(vocab=264), 2, dp=2).write(tmp_path / "plan.yaml")
    done = meshwright("train", tmp_path / "plan.yaml", "--data", text(tmp_path), "--replan", "--out", tmp_path / "r")
    assert done.code == 2
    assert "start the command with torchrun" in done.err
