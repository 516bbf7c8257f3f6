"""What ranks leave in a run's folder: steps, memory, failures; the doctor reads it back."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from meshwright.doctor.efficiency import diagnose_efficiency
from meshwright.doctor.oom import diagnose_oom
from meshwright.doctor.out_of_memory import Refusal
from meshwright.doctor.run_records import read_run
from meshwright.runtime import oom_kill
from meshwright.runtime.launch import RankFailedError
from meshwright.runtime.oom_kill import oom_kills
from meshwright.runtime.stage import StageModule

from .jobs import BATCH, SEQ, run


def test_every_rank_leaves_its_steps_and_memory(tmp_path: Path):
    run(tmp_path, "run", 6, {"pp": 2, "dp": 2})
    found = read_run(tmp_path / "run")
    assert found.notes == ()
    assert [rank.coordinates["pp"] for rank in found.ranks] == [0, 1, 0, 1]
    for rank in found.ranks:
        assert [step.step for step in rank.steps] == [1, 2, 3, 4, 5, 6]
        for step in rank.steps:
            assert step.compute_s + sum(step.waited_s.values()) == pytest.approx(step.step_s, abs=1e-5)
        assert rank.memory is not None
        assert rank.memory.peak_bytes > rank.memory.before_bytes > 0
        kinds = rank.memory.by_kind
        assert kinds["optimizer"] == pytest.approx(2 * kinds["parameters"], rel=0.01)  # two moments in fp32
        assert kinds["gradients"] == kinds["parameters"]
    assert found.tokens_per_step == BATCH * SEQ


def test_a_failed_allocation_names_module_action_and_microbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, calls = StageModule.forward, [0]

    def greedy(self: StageModule, *inputs: Any) -> Any:
        calls[0] += 1
        if dist.get_rank() == 1 and calls[0] == 3:
            torch.empty(2**46, dtype=torch.uint8)  # more than any address space: the allocator's own refusal
        return whole(self, *inputs)

    monkeypatch.setattr(StageModule, "forward", greedy)
    with pytest.raises(RankFailedError):
        run(tmp_path, "run", 2, {"pp": 2, "micro_batch": 2})
    report = diagnose_oom(read_run(tmp_path / "run"))
    event = report.event
    assert event is not None
    assert (event.rank, event.coordinates["pp"]) == (1, 1)
    assert event.refusal == Refusal("CPU", requested_bytes=2**46)
    assert (event.step, event.action, event.microbatch) == (1, "forward", 2)
    assert not report.fits
    assert report.cures


def test_a_module_deep_in_the_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    def greedy(self: Any, inputs: torch.Tensor) -> Any:
        return torch.empty(2**46, dtype=torch.uint8)

    monkeypatch.setattr(LlamaMLP, "forward", greedy)
    with pytest.raises(RankFailedError):
        run(tmp_path, "run", 1, {})
    event = diagnose_oom(read_run(tmp_path / "run")).event
    assert event is not None
    assert event.module == "model.layers.0.mlp"


def test_a_rank_that_the_kernel_killed_for_memory_is_told_from_one_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = StageModule.forward

    def killed(self: StageModule, *inputs: Any) -> Any:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, *inputs)

    monkeypatch.setattr(StageModule, "forward", killed)
    counts = iter([4, 5, 5, 5])
    monkeypatch.setattr(oom_kill, "oom_kills", lambda: next(counts))
    events: list[Any] = []
    for name in ("for memory", "by hand"):
        with pytest.raises(RankFailedError):
            run(tmp_path, name, 2, {"dp": 2})
        events.append(diagnose_oom(read_run(tmp_path / name)).event)
    assert events[0].refusal == Refusal("kernel")
    assert events[0].rank == 1
    assert events[1] is None


def test_the_kernels_count_is_read_from_both_kinds_of_cgroup(tmp_path: Path):
    process = tmp_path / "cgroup"
    process.write_text("0::/job\n")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "memory.events").write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert oom_kills(process, tmp_path) == 2
    process.write_text("5:cpu:/x\n4:memory:/job\n")
    (tmp_path / "memory" / "job").mkdir(parents=True)
    (tmp_path / "memory" / "job" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 7\n")
    assert oom_kills(process, tmp_path) == 7
    assert oom_kills(tmp_path / "none", tmp_path) is None


def test_training_on_a_named_cluster_leaves_a_comparison(tmp_path: Path, meshwright: Any):
    from .jobs import plan, text
    from .tiny import tiny

    document = plan(tiny(vocab=264), 6, dp=2)
    values = document.to_dict() | {"cluster": {"name": "cpu"}}
    text(tmp_path)
    type(document).model_validate(values).write(tmp_path / "plan.yaml")
    out = tmp_path / "run"
    done = meshwright("train", tmp_path / "plan.yaml", "--data", tmp_path / "text.txt", "--out", out, "--json")
    assert done.code == 0, done.err
    rows = {row["name"]: row for row in json.loads(done.out)["comparison"]["rows"]}
    assert rows["step"]["predicted"] > 0
    assert rows["step"]["measured"] > 0
    assert json.loads((out / "comparison.json").read_text())["rows"][0] == rows["step"]
    shown = meshwright("doctor", "efficiency", out, "--json", "-o", tmp_path / "faster.yaml")
    assert shown.code == 0, shown.err
    assert json.loads(shown.out)["steps"] == 6
    memory = meshwright("doctor", "oom", out, "--json")
    assert memory.code == 0, memory.err
    assert json.loads(memory.out)["fits"] is True


def test_a_rank_that_sleeps_is_ranked_first_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = StageModule.forward

    def slow(self: StageModule, *inputs: Any) -> Any:
        if dist.get_rank() == 1:
            time.sleep(0.1)
        return whole(self, *inputs)

    monkeypatch.setattr(StageModule, "forward", slow)
    run(tmp_path, "run", 14, {"dp": 2, "micro_batch": 4})
    first = diagnose_efficiency(read_run(tmp_path / "run")).faults[0]
    assert first.kind == "straggler"
    assert "rank 1" in first.words
