"""A run learns, in every precision; says what it did line by line; and stops where the loss leaves the numbers."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from meshwright.errors import InputError
from meshwright.layout.config import Precision
from meshwright.runtime import metrics
from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.launch import Device, run_ranks
from meshwright.runtime.metrics import MetricsWriter, Peak, StepMetrics, mfu
from meshwright.runtime.process_groups import AxisGroup, ProcessGroupManager

from .jobs import BATCH, SEQ, run
from .layouts import layout

LAYOUT: dict[str, Any] = {"tp": 2, "dp": 2, "zero": 1, "sequence_parallel": True}


def lines_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_a_run_learns_and_writes_a_line_per_step(tmp_path: Path):
    outcome = run(tmp_path, "run", 8, LAYOUT | {"training": {"warmup_steps": 4}})
    assert outcome.losses[-1] < outcome.losses[0] - 0.5
    assert outcome.diverged_at is None
    steps = lines_of(tmp_path / "run", "step")
    assert [s["step"] for s in steps] == list(range(1, 9))
    assert [s["loss"] for s in steps] == list(outcome.losses)
    assert [s["tokens"] for s in steps] == [BATCH * SEQ] * 8
    assert [s["sequences"] for s in steps] == [BATCH * (i + 1) for i in range(8)]
    rates = [s["learning_rate"] for s in steps]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert rates[4] == pytest.approx(0.01)
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
    last = steps[-1]
    assert last["tokens_per_s"] == pytest.approx(BATCH * SEQ / last["step_s"])
    assert last["tokens_per_s_per_rank"] == pytest.approx(last["tokens_per_s"] / 4)
    assert set(last["axis_wait_s"]) == {"dp", "tp"}
    assert 0 < sum(last["axis_wait_s"].values()) < last["step_s"]
    assert last["peak_memory_bytes"] > 2**20
    assert last["mfu"] is None
    ledgers = lines_of(tmp_path / "run", "ledger")
    assert [(ledger["stage"], ledger["step"]) for ledger in ledgers] == [(0, 8)]
    assert {entry["axis"] for entry in ledgers[0]["traffic"]} == {"dp", "tp"}


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16])
def test_narrow_precisions_learn_like_fp32(tmp_path: Path, precision: Precision):
    wide = run(tmp_path, "wide", 6, {"dp": 2})
    narrow = run(tmp_path, "narrow", 6, {"dp": 2, "precision": precision})
    assert narrow.losses == pytest.approx(wide.losses, rel=0.03)
    scales = [s["loss_scale"] for s in lines_of(tmp_path / "narrow", "step")]
    assert scales == [None] * 6 if precision is Precision.BF16 else all(scale >= 1 for scale in scales)


def test_a_run_whose_loss_is_not_finite_stops_without_a_checkpoint(tmp_path: Path):
    wild = {"training": {"learning_rate": 1e30, "gradient_clip": 0.0}}
    outcome = run(tmp_path, "run", 9, wild, checkpoint_every=9)
    assert outcome.diverged_at is not None
    assert not math.isfinite(outcome.losses[-1])
    assert len(outcome.losses) == outcome.diverged_at < 9
    assert outcome.checkpoint is None
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert lines_of(tmp_path / "run", "step")[-1]["loss"] in ("nan", "inf")


def step_metrics(step: int) -> StepMetrics:
    return StepMetrics(step, 1.0, 1.0, 1.0, 1, 1, 1.0, 1.0, 1.0, None, {}, 1)


def test_a_resumed_run_replaces_the_lines_of_later_steps_and_of_a_torn_write(tmp_path: Path):
    with MetricsWriter(tmp_path, 0) as writer:
        for step in (1, 2, 3):
            writer.step(step_metrics(step))
    with (tmp_path / metrics.METRICS_FILE).open("a") as file:
        file.write('{"kind": "step", "st')
    with MetricsWriter(tmp_path, 2) as writer:
        writer.step(step_metrics(3))
    assert [line["step"] for line in lines_of(tmp_path, "step")] == [1, 2, 3]


def test_mfu_is_known_only_for_the_device_whose_peak_it_is():
    peak = Peak("cuda", 1e15, 6e9)
    assert mfu(50_000.0, torch.device("cuda"), peak) == pytest.approx(0.3)
    assert mfu(50_000.0, torch.device("cpu"), peak) is None
    assert mfu(50_000.0, torch.device("cpu"), None) is None


@pytest.mark.skipif(find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_tensorboard_that_is_not_installed_is_asked_for(tmp_path: Path):
    with pytest.raises(InputError, match="pip install tensorboard"):
        MetricsWriter(tmp_path, 0, tensorboard=True)


def waited() -> tuple[dict[str, float], dict[str, float]]:
    groups = ProcessGroupManager(layout(tp=2), Device("cpu", "gloo"))
    axis: AxisGroup = groups.axis("tp")
    all_reduce(torch.ones(1000), axis, "a sum")
    before = groups.recorder.waited_s()
    groups.recorder.reset()
    return before, groups.recorder.waited_s()


def test_the_time_in_collectives_is_booked_on_their_axis():
    for before, after in run_ranks(2, waited):
        assert list(before) == ["tp"]
        assert 0 < before["tp"] < 60
        assert after == {}
