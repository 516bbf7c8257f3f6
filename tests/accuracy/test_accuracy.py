"""The tools behind docs/accuracy.md: the null model does not see the row, goals are judged on the right side, results
that are kept are kept under everything they depend on, other tools are asked what the row says.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tools.accuracy import store
from tools.accuracy.ask_aiconfigurator import job_of as serving_job
from tools.accuracy.ask_llm_analysis import job_of
from tools.accuracy.environments import UnavailableError, run
from tools.accuracy.goals import Figure, Goal
from tools.accuracy.null_model import Utilised, efficiencies
from tools.accuracy.scores import Line, repredicted, table
from tools.accuracy.svg import scatter
from tools.accuracy.training import predict
from tools.calibrate.rows import load_rows

from meshwright.validation import validate_file
from meshwright.validation.scored import Group, Pair, ScoredRow

ROW = {
    "id": "r0",
    "tier": "A",
    "family": "f0",
    "config_group": "c0",
    "leak_group": "l0",
    "framework": "Megatron-LM",
    "model": {"name": "GPT-1.7B", "layers": 24, "hidden": 2304, "heads": 24, "kv_heads": 24, "head_dim": 96,
              "ffn": 9216, "vocab": 51200, "gated_mlp": False, "tied_embeddings": True, "experts": None},
    "seq": 2048, "gpu": "A100-80GB-SXM", "gpus": 32, "gpus_per_node": 8, "nvlink_domain": 8, "intra_bw": 300,
    "inter_bw": 25, "precision": "fp16", "tp": 1, "pp": 1, "vpp": 1, "dp": 32, "cp": 1, "ep": 1, "etp": None,
    "sp": False, "zero": 0, "recompute": "full", "micro_batch": 16, "global_batch": 512,
    "measured": {"tokens_per_s_per_gpu": 9000.0},
}  # fmt: skip
SERVED = {
    "id": "s0",
    "kind": "throughput",
    "gpu": "H200-141GB-SXM",
    "gpus": 8,
    "tp": 8,
    "pp": 1,
    "ep": 8,
    "attention_dp": True,
    "precision": "fp8",
    "kv_precision": None,
    "isl": 1000,
    "osl": 500,
    "model": {"name": "Qwen3-235B-A22B", "experts": 128},
}


def written(folder: Path, *rows: dict[str, object]) -> Path:
    path = folder / "train.jsonl"
    path.write_text("\n".join(json.dumps({**ROW, **row}) for row in rows), encoding="utf-8")
    return path


def scored(row: str, measured: float, predicted: float, sweep: str = "") -> ScoredRow:
    return ScoredRow(
        Group(row, "f", "A", "dense", sweep), Pair(measured, predicted), None, True, True, predicted, 1.0, ()
    )


def test_every_fit_predicts_every_row_and_the_shipped_one_as_validate_does(tmp_path: Path) -> None:
    sizes = [(4, 32), (8, 32), (16, 32), (16, 16)]
    path = written(
        tmp_path,
        *(
            {"id": f"r{i}", "family": f"f{i % 2}", "config_group": f"c{i}", "leak_group": f"l{i // 2}",
             "micro_batch": micro, "dp": dp, "tp": 32 // dp}
            for i, (micro, dp) in enumerate(sizes)
        ),
    )  # fmt: skip
    held = predict(path, lambda _: None)
    shipped = {row.group.id: row.predicted_rate for row in validate_file(path).scored}
    assert {len(rates) for rates in held.values()} == {len(sizes)}
    assert held["fitted"] == pytest.approx(shipped, rel=1e-9)
    assert held["leave one family out"] != held["fitted"]


def test_the_null_model_takes_the_median_of_other_folds(tmp_path: Path) -> None:
    rates = [9000.0, 8000.0, 7000.0, 6000.0, 1.0]
    path = written(tmp_path, *({"id": f"r{i}", "measured": {"tokens_per_s_per_gpu": r}} for i, r in enumerate(rates)))
    rows = Utilised.of(load_rows(path))
    mfu = efficiencies(rows, np.array([0, 0, 1, 1, 2]))
    predicted = mfu * rows.at_peak
    assert predicted == pytest.approx([6000.0, 6000.0, 8000.0, 8000.0, 7500.0])


@pytest.mark.parametrize(("value", "at_least", "met"), [(0.05, False, True), (0.051, False, False), (0.8, True, True)])
def test_a_goal_is_judged_on_its_side_of_the_bound(value: float, at_least: bool, met: bool) -> None:
    figure = Figure("median", value, 0.8 if at_least else 0.05, at_least)
    assert Goal("rows", 3, (figure,)).met is met


def test_a_goal_without_a_figure_is_missed() -> None:
    assert not Goal("rows", 0, (Figure("median", None, 0.05),)).met


def test_other_predictions_replace_ours_and_rows_without_one_are_left_out() -> None:
    rows = [scored("a", 100, 50), scored("b", 100, 100)]
    found = repredicted(rows, {"a": 90.0})
    assert [(r.group.id, r.predicted_rate) for r in found] == [("a", 90.0)]
    assert found[0].rate is not None
    assert found[0].rate.ape == pytest.approx(0.1)


def test_the_table_has_errors_and_ranking() -> None:
    rows = [scored(str(i), 100 + i, 100 - i, "s") for i in range(3)]
    line = table([Line.of("all", rows)]).splitlines()[-1]
    assert line == "| all | 3 | 2.0 % | 2.0 % | 3.5 % | -2.0 % | 1 | -1.00 (-1.00) | 2.0 % |"


def test_a_kept_result_is_worked_out_again_when_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BUILD", tmp_path / "build")
    source, done = tmp_path / "a.txt", []

    def work() -> int:
        done.append(1)
        return len(done)

    source.write_text("one")
    assert [store.kept("x", [source], ["w"], work) for _ in range(2)] == [1, 1]
    source.write_text("two")
    assert store.kept("x", [source], ["w"], work) == 2
    assert store.kept("x", [source], ["other"], work) == 3


def test_llm_analysis_is_asked_what_the_row_says(tmp_path: Path) -> None:
    case = load_rows(written(tmp_path, {})).cases[0]
    job = job_of(case, 0.4)
    assert isinstance(job, dict)
    assert (job["model"]["num_layers"], job["recompute"], job["split"]["dp_size"]) == (24, "full", 32)
    assert job["flops_efficiency"] == 0.4
    model, cluster, work, config, stack = case
    assert job_of((model, cluster, work, replace(config, cp=2), stack), 0.4) == "has no context parallelism"


def test_aiconfigurator_is_asked_what_the_row_says() -> None:
    job = serving_job(SERVED)
    assert isinstance(job, dict)
    assert (job["tp"], job["attention_dp"], job["moe_tp"], job["moe_ep"]) == (1, 8, 1, 8)
    assert (job["gemm"], job["cache"], job["prompt"]) == ("fp8", "fp8", 1000)
    assert serving_job({**SERVED, "gpu": "A100-80GB-PCIe"}) == "has no data for A100-80GB-PCIe"


def test_a_tool_that_fails_says_why(tmp_path: Path) -> None:
    script = tmp_path / "peer.py"
    script.write_text("raise SystemExit('no such table')")
    with pytest.raises(UnavailableError, match="no such table"):
        run(Path(sys.executable), script, {})


def test_the_plot_is_a_picture_with_a_mark_per_point() -> None:
    picture = ET.fromstring(scatter({"a & b": [(1.0, 1.1), (10.0, 9.0)], "c": [(5.0, 5.0)]}, "t", "s"))
    marks = [e.get("d", "") for e in picture.iter() if e.get("class") == "p"]
    assert [m.count("h0") for m in marks] == [2, 1]
