"""`meshwright train`: runs, resumes, compares ledgers, and answers bad input with one line and exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from .jobs import plan, text
from .tiny import tiny

Run = Callable[..., Any]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Plan, text and the folder of the run."""
    text(tmp_path)
    document = plan(tiny(vocab=264), 2, tp=2, dp=2, zero=1, sequence_parallel=True)
    document.write(tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml", tmp_path / "text.txt", tmp_path / "run"


def test_it_trains_resumes_elsewhere_and_exports(meshwright: Run, files: tuple[Path, Path, Path]):
    plan_file, data, out = files
    trace = out.parent / "step.json"
    done = meshwright("train", plan_file, "--data", data, "--out", out, "--ledger", "--json", "--trace", trace)
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["overlap"]["step"] == 2
    assert set(document["overlap"]["axes"]) == {"dp", "tp"}
    assert {e["pid"] for e in json.loads(trace.read_text())["traceEvents"]} == {0, 1, 2, 3}
    assert len(document["losses"]) == 2
    assert document["ledger"]["agrees"] is True
    assert {line["axis"] for line in document["ledger"]["lines"]} == {"dp", "tp"}
    refused = meshwright("train", plan_file, "--data", data, "--out", out)
    assert refused.code == 2
    assert "--resume" in refused.err
    values = yaml.safe_load(plan_file.read_text())
    values["parallel"] |= {"tp": 1, "dp": 1, "pp": 2, "zero": 0, "sequence_parallel": False}
    plan_file.write_text(yaml.safe_dump(values))
    again = meshwright("train", plan_file, "--data", data, "--out", out, "--resume", "--steps", 4, "--export")
    assert again.code == 0, again.err
    assert "step      4  loss" in again.out
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4]
    assert AutoModelForCausalLM.from_pretrained(out / "model").num_parameters() > 0


def test_a_ledger_that_differs_is_the_answer_no(
    meshwright: Run, files: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
):
    from meshwright.runtime import gradients

    whole_norm = gradients.all_reduce

    def twice(tensor: Any, axis: Any, what: str) -> None:
        whole_norm(tensor, axis, what)
        if what == gradients.NORM and axis.axis == "tp":
            axis.record("all_reduce", what, 8)

    monkeypatch.setattr(gradients, "all_reduce", twice)
    done = meshwright("train", files[0], "--data", files[1], "--out", files[2], "--ledger")
    assert done.code == 1
    assert "1 calls, 8 bytes" in done.out
    assert "1 lines DIFFER" in done.out


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"workload": {"kind": "serving", "prompt": 8, "output": 8}}, [], "plan for serving"),
        ({"parallel": {"dp": 100, "global_batch": 100}}, [], "more than the 64"),
        ({"parallel": {"precision": "fp8"}}, [], "precision fp8 cannot be trained"),
        ({"workload": {"seq": 100_000}}, [], "too few"),
        ({}, ["--tokenizer", "nowhere"], "no such tokenizer.json"),
        ({}, ["--resume-from", "nowhere"], "not a checkpoint"),
        ({}, ["--weights", "nowhere"], "neither model.safetensors"),
        ({}, ["--data", "nowhere"], "no such file or folder"),
        ({}, ["--steps", "0"], "steps"),
        ({}, ["--trace-step", "2"], "give --trace FILE too"),
        ({}, ["--trace", "step.json", "--trace-step", "3"], "this run does steps 1 to 2"),
        ({"training": {"learning_rate": -1.0}}, [], "learning_rate"),
        ({"model": {"name": "t", "config": {"model_type": "bert"}}}, [], "bert"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    meshwright: Run, files: tuple[Path, Path, Path], changes: dict[str, Any], options: list[str], words: str
):
    plan_file, data, out = files
    values = yaml.safe_load(plan_file.read_text()) | changes
    plan_file.write_text(yaml.safe_dump(values))
    done = meshwright("train", plan_file, "--data", data, "--out", out, *options)
    assert done.code == 2
    assert words in done.err
    assert len(done.err.strip().splitlines()) == 1
