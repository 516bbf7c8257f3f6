"""The fit of constants: scales that never leave their bounds, folds that never split a group, constants found again."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tools.calibrate.crossval import folds, left_out
from tools.calibrate.parameters import RANGES, Constants, Parameter, current
from tools.calibrate.problem import Case, Problem, groups
from tools.calibrate.relevant import relevant
from tools.calibrate.solve import STEP, jacobian, solve
from tools.calibrate.write import SENSITIVE, fitted_toml

from meshwright.cost.stack import stack_for
from meshwright.cost.workload import Workload
from meshwright.hardware.load import load
from meshwright.layout.config import HybridParallelConfig, Recompute
from meshwright.models.from_config import spec_from_config

EVERY = [
    Parameter(kind, owner, field)
    for kind, owner in (("device", "hopper"), ("stack", "nanotron"), ("network", "network"))
    for field in RANGES[kind]
]
MODEL = spec_from_config(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
    }
)


def cases() -> list[Case]:
    """Jobs on 64 GPUs that differ in what they depend on."""
    cluster = load("h100-sxm", nodes=8)
    base = HybridParallelConfig(dp=64, global_batch=512, zero=1)
    configs = [
        replace(base, dp=64 // tp, tp=tp, sequence_parallel=tp > 1, micro_batch=micro, recompute=recompute)
        for tp in (1, 2, 4, 8)
        for micro in (1, 2, 4)
        for recompute in (Recompute.NONE, Recompute.FULL)
    ]
    return [(MODEL, cluster, Workload(4096), config, stack_for("megatron-core")) for config in configs]


def moved(shift: float) -> tuple[list[Parameter], np.ndarray, np.ndarray]:
    """A few constants, their prior, and a point `shift` away on their free scales."""
    names = (("device", "hopper", "gemm"), ("stack", "megatron-core", "elementwise_passes"))
    parameters = [Parameter(*name) for name in names]
    prior = np.array([p.inward(current(p)) for p in parameters])
    return parameters, prior, prior + shift


@given(which=st.sampled_from(EVERY), free=st.floats(-50, 50))
def test_a_constant_never_leaves_its_bounds(which: Parameter, free: float) -> None:
    assert which.range.low <= which.outward(free) <= which.range.high


@given(which=st.sampled_from(EVERY), share=st.floats(0.05, 0.95))
def test_scales_of_the_fit_go_there_and_back(which: Parameter, share: float) -> None:
    value = which.range.low + share * (which.range.high - which.range.low)
    assert which.outward(which.inward(value)) == pytest.approx(value)


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=50))
def test_folds_never_split_a_group(names: list[str]) -> None:
    found = folds(names, 5)
    assert all(len({int(f) for f, n in zip(found, names, strict=True) if n == name}) == 1 for name in names)


def test_the_fit_finds_constants_that_made_the_measurements() -> None:
    parameters, prior, truth = moved(0.4)
    made = Problem(groups(cases()), np.ones(24), np.ones(24))
    seconds = np.exp(made.residuals(Constants.of(parameters, truth)))
    problem = replace(made, measured_s=seconds)
    found = solve(problem, parameters, prior, prior, np.full(24, 0.001), iterations=12)
    assert found.free == pytest.approx(truth, abs=0.02)
    assert np.abs(found.residuals).max() < 0.003


def test_a_row_left_out_does_not_speak_for_itself() -> None:
    parameters, prior, truth = moved(0.3)
    made = Problem(groups(cases()), np.ones(24), np.ones(24))
    seconds = np.exp(made.residuals(Constants.of(parameters, truth)))
    seconds[0] *= 3.0
    problem = replace(made, measured_s=seconds)
    scale = np.full(24, 0.05)
    whole = solve(problem, parameters, prior, prior, scale)
    alone = left_out(problem, parameters, whole, prior, scale, np.arange(24) == 0)
    assert np.isfinite(alone).all()
    assert alone[0] == pytest.approx(-np.log(3.0), abs=0.05)


def test_only_constants_that_rows_depend_on_are_fitted() -> None:
    labels = {p.label for p in relevant(groups(cases()))}
    assert "device.hopper.gemm" in labels
    assert "stack.megatron-core.tp_overlap" in labels
    assert not [label for label in labels if "ampere" in label or "gemm_fp8" in label or "ep_overlap" in label]


def test_the_written_file_holds_every_value_with_its_evidence() -> None:
    parameters, prior, _ = moved(0.0)
    problem = Problem(groups(cases()), np.ones(24), np.ones(24))
    solution = solve(problem, parameters, prior, prior, np.full(24, 0.05), iterations=2)
    read = tomllib.loads(fitted_toml(parameters, solution, 24))
    assert read["device"]["hopper"]["gemm"] == pytest.approx(parameters[0].outward(float(solution.free[0])), rel=1e-4)
    further = Constants.of(parameters, solution.free + np.array([0.0, STEP]))
    moved_rows = np.abs(problem.residuals(further) - solution.residuals) > SENSITIVE * STEP
    assert 12 <= moved_rows.sum() <= 24
    assert f"{moved_rows.sum()} rows" in read["evidence"]["stack"]["megatron-core"]["elementwise_passes"]


def test_a_constant_at_its_upper_bound_is_written_as_found() -> None:
    parameters = [Parameter("device", "hopper", "k_half")]
    highest = parameters[0].range.high
    made = Problem(groups(cases()), np.ones(24), np.ones(24))
    further = np.array([np.log(highest) + 0.5])
    seconds = np.exp(made.residuals(Constants.of(parameters, further)))
    problem = replace(made, measured_s=seconds)
    prior = np.array([parameters[0].inward(current(parameters[0]))])
    found = solve(problem, parameters, prior, prior, np.full(24, 0.001), iterations=12)
    assert found.free[0] == pytest.approx(np.log(highest), abs=1e-3)
    assert np.abs(jacobian(problem, parameters, found.free, found.residuals)).max() > SENSITIVE
    assert tomllib.loads(fitted_toml(parameters, found, 24))["device"]["hopper"]["k_half"] == pytest.approx(
        highest, rel=1e-3
    )
