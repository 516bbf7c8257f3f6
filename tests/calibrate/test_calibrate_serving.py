"""The fit of engines' traits: the same predictions as validation, traits found again, releases that lean on the one
before, folds that have not seen their rows.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.validation.rows import MODEL, MOE
from tools.accuracy.serving import predict
from tools.calibrate.solve import Solution
from tools.calibrate_serving.folds import FITS, predicted
from tools.calibrate_serving.problem import Problem, problem_of
from tools.calibrate_serving.rows import Rows, load_rows
from tools.calibrate_serving.solve import jacobian, solve
from tools.calibrate_serving.traits import RANGES, Parameter, engines, lineage, parameters, shipped
from tools.calibrate_serving.write import fitted_toml

from meshwright.cost.serving_stack import serving_stacks
from meshwright.validation import validate_file

ROW: dict[str, Any] = {
    "tier": "A", "framework": "TensorRT-LLM 1.0", "kind": "throughput", "model": MODEL, "gpu": "H100-80GB-SXM",
    "gpus": 2, "gpus_per_node": 8, "tp": 2, "pp": 1, "ep": 1, "attention_dp": False, "isl": 1000, "osl": 1000,
    "batch": None, "precision": "fp8", "kv_precision": "fp8", "measured": {"tokens_per_s_per_gpu_output": 5000.0},
}  # fmt: skip
BATCH = {"kind": "static_batch_latency", "batch": 8, "measured": {"latency_ms": 900.0}}
VARIED: list[dict[str, Any]] = [
    {"tp": tp, "gpus": tp, "isl": isl, "osl": osl, "framework": f"TensorRT-LLM {release}", **kind}
    for release in ("0.17", "1.0", "1.2-dev")
    for tp in (1, 2, 4)
    for isl, osl in ((128, 128), (128, 2048), (2048, 128))
    for kind in ({}, BATCH)
]


def written(folder: Path, *changes: dict[str, Any]) -> Path:
    path = folder / "serve.jsonl"
    path.write_text("\n".join(json.dumps({**ROW, "id": f"r{i}", **c}) for i, c in enumerate(changes)))
    return path


def made_up(folder: Path, truth: dict[str, float]) -> tuple[Rows, Problem, list[Parameter]]:
    """Rows whose measurements are what the model says with every trait of `truth` times its factor, in all engines."""
    rows = load_rows(written(folder, *VARIED))
    traits = {
        name: replace(stack, **{field: getattr(stack, field) * by for field, by in truth.items()})
        for name, stack in serving_stacks(fitted=False).items()
    }
    problem = problem_of(rows)
    rows = replace(rows, measured=rows.measured * np.exp(problem.residuals(traits)))
    return rows, problem_of(rows), parameters(case.stack.name for case in rows.cases)


def test_the_fit_predicts_what_validation_predicts(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {},
        {"isl": 128, "num_requests": 70},
        {"kind": "static_batch_latency", "batch": 8, "measured": {"latency_ms": 900.0}},
        {"kind": "ttft_batch1", "batch": 1, "osl": 1, "measured": {"ttft_ms": 20.0}},
        {"kind": "batch1_decode", "batch": 1, "framework": "gpt-fast", "precision": "int4"},
        {"model": MOE, "gpus": 8, "tp": 8, "ep": 8, "attention_dp": True, "framework": "TensorRT-LLM 1.2-dev"},
        {"gpus": 4, "tp": 2, "pp": 2},
    )
    held = predict(path, lambda _: None)
    validated = {row.group.id: row.predicted_rate for row in validate_file(path).scored}
    assert set(held) == set(FITS)
    assert held["fitted"] == pytest.approx(validated, rel=1e-9)
    assert all(set(rates) == set(validated) for rates in held.values())


def test_traits_are_found_again(tmp_path: Path) -> None:
    truth = {"gemm_fp8": 0.85, "step_host_s": 4.0}
    rows, problem, chosen = made_up(tmp_path, truth)
    before = np.abs(problem.residuals(engines([], np.zeros(0))))
    found = solve(problem, chosen, rows)
    assert np.median(np.abs(found.residuals)) < 0.2 * np.median(before)
    stack = engines(chosen, found.free)["tensorrt-llm"]
    assumed = serving_stacks(fitted=False)["tensorrt-llm"]
    assert stack.gemm_fp8 * stack.gemm == pytest.approx(0.85 * assumed.gemm_fp8 * assumed.gemm, rel=0.05)
    assert stack.step_host_s > 2 * assumed.step_host_s


def test_a_release_that_is_left_out_is_predicted_by_the_one_before(tmp_path: Path) -> None:
    """Its rows are moved far away: they must not move their own prediction."""
    rows, _, chosen = made_up(tmp_path, {"gemm_fp8": 0.9})
    late = np.array([case.stack.name == "tensorrt-llm-1-2" for case in rows.cases])

    def left_out(measured: np.ndarray) -> np.ndarray:
        asked = replace(rows, measured=measured)
        fitted = problem_of(asked)
        base = fitted.residuals(engines(chosen, np.zeros(len(chosen))))
        slope = jacobian(fitted, chosen, np.zeros(len(chosen)), base)
        whole = Solution(np.zeros(len(chosen)), base, slope, np.zeros(len(chosen)))
        rates = predicted(fitted, chosen, whole, asked)["leave one release out"]
        return np.array([rates[name] for name in asked.ids])

    as_measured = left_out(rows.measured)
    assert left_out(np.where(late, 3.0 * rows.measured, rows.measured))[late] == pytest.approx(as_measured[late])
    assert left_out(np.where(late, rows.measured, 1.3 * rows.measured))[late] != pytest.approx(as_measured[late])


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=2))
def test_traits_stay_within_their_bounds_and_releases_inherit_offsets(offsets: list[float]) -> None:
    field = "cache_stream"
    chosen = [Parameter("tensorrt-llm", field), Parameter("tensorrt-llm-pytorch", field)]
    found = engines(chosen, np.array(offsets))
    r = RANGES[field]
    assert all(r.low <= getattr(stack, field) <= r.high for stack in found.values())
    assert getattr(found["vllm"], field) == getattr(found["tensorrt-llm"], field)
    assert getattr(found["tensorrt-llm-1-2"], field) == getattr(found["tensorrt-llm-pytorch"], field)
    assert lineage("tensorrt-llm-1-2") == ["tensorrt-llm-1-2", "tensorrt-llm-pytorch", "tensorrt-llm"]


def test_the_shipped_traits_are_offsets_from_the_assumed_ones() -> None:
    chosen = parameters(serving_stacks())
    found = engines(chosen, shipped(chosen))
    for name, stack in serving_stacks().items():
        for field, r in RANGES.items():
            if r.low <= getattr(stack, field) <= r.high:
                assert getattr(found[name], field) == pytest.approx(getattr(stack, field), rel=1e-9), (name, field)


def test_what_is_written_is_what_was_found_with_the_rows_behind_it(tmp_path: Path) -> None:
    rows, problem, chosen = made_up(tmp_path, {"kernel_s": 1.5})
    found = solve(problem, chosen, rows)
    text = tomllib.loads(fitted_toml(chosen, found, len(rows)))
    traits = engines(chosen, found.free)
    assert text["rows"] == len(VARIED)
    for name, values in text["engine"].items():
        for field, value in values.items():
            assert value == pytest.approx(getattr(traits[name], field), rel=1e-4)
            assert "rows" in text["evidence"][name][field]
    assert "expert_gemm" not in text["engine"]["tensorrt-llm"]  # these rows have no experts
