"""Serving rows: every kind read, predicted by the serving model and scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.validation.rows import MODEL, MOE, ROW, write

from meshwright.cost.serving import serve_estimate
from meshwright.layout.config import Precision
from meshwright.models.fields import Fields
from meshwright.validation import validate_file
from meshwright.validation.scored import Group
from meshwright.validation.serving_row import ServingCase, serving_case
from meshwright.validation.shapes import Shapes
from meshwright.validation.skip import SkippedError

SERVING: dict[str, Any] = {
    "id": "serve-1",
    "tier": "A",
    "framework": "TensorRT-LLM 0.17",
    "kind": "throughput",
    "model": MODEL,
    "gpu": "H100-80GB-SXM",
    "gpus": 2,
    "gpus_per_node": 8,
    "tp": 2,
    "pp": 1,
    "ep": 1,
    "attention_dp": False,
    "isl": 1000,
    "osl": 200,
    "batch": None,
    "precision": "fp16",
    "kv_precision": "fp16",
    "measured": {"tokens_per_s_per_gpu_output": 5000.0},
}


def case(**changes: Any) -> ServingCase:
    return serving_case(Fields(SERVING | changes, "rows:1"), Group("serve-1", "s", "A", "dense"), Shapes())


def test_saturation_takes_the_engines_own_batch_and_is_scored_in_output_tokens_per_gpu(tmp_path: Path) -> None:
    read = case()
    assert read.batch is None
    expected = serve_estimate(read.model, read.cluster, read.workload, read.config, None, read.stack)
    (scored,) = validate_file(write(tmp_path / "s.jsonl", SERVING)).scored
    assert scored.rate is not None
    assert scored.rate.measured == 5000.0
    assert scored.rate.predicted == pytest.approx(expected.tokens_per_s_per_gpu)
    assert scored.group.family == "TensorRT-LLM 0.17 throughput"


def test_a_static_batch_is_scored_by_its_tokens_over_its_latency(tmp_path: Path) -> None:
    row = SERVING | {"kind": "static_batch_latency", "batch": 8, "measured": {"latency_ms": 1000.0}}
    read = case(kind="static_batch_latency", batch=8, measured={"latency_ms": 1000.0})
    expected = serve_estimate(read.model, read.cluster, read.workload, read.config, 8, read.stack)
    (scored,) = validate_file(write(tmp_path / "s.jsonl", row)).scored
    assert scored.rate is not None
    assert scored.rate.measured == pytest.approx(8 * 200 / 1.0 / 2)
    assert scored.rate.predicted == pytest.approx(8 * 200 / expected.latency_s / 2)


def test_time_to_first_token_is_scored_as_prompt_tokens_per_second() -> None:
    read = case(kind="ttft_batch1", batch=1, osl=1, measured={"ttft_ms": 20.0})
    assert read.measured_rate == pytest.approx(1000 / 0.02 / 2)


def test_a_decode_row_without_lengths_is_a_short_prompt_and_says_so() -> None:
    read = case(kind="batch1_decode", batch=1, isl=None, osl=None)
    assert (read.workload.prompt, read.workload.output) == (8, 200)
    assert read.assumed


def test_attention_dp_turns_the_tensor_group_into_replicas() -> None:
    read = case(model=MOE, gpus=8, tp=8, ep=8, attention_dp=True)
    assert (read.config.dp, read.config.tp, read.config.ep) == (8, 1, 8)


@pytest.mark.parametrize(
    ("precision", "format_", "weight_bytes", "cache_bytes"),
    [
        ("fp8", Precision.FP8, None, 1.0),
        ("nvfp4", Precision.NVFP4, None, 1.0),
        ("bf16", Precision.BF16, None, 2.0),
        ("int8", Precision.BF16, 1.0, 2.0),
        ("int4", Precision.BF16, 0.625, 2.0),
    ],
)
def test_weight_only_formats_compute_in_16_bits_and_the_cache_follows_the_weights(
    precision: str, format_: Precision, weight_bytes: float | None, cache_bytes: float
) -> None:
    read = case(precision=precision, kv_precision=None)
    assert (read.config.precision, read.weight_bytes) == (format_, weight_bytes)
    assert read.workload.kv_bytes_per_element == cache_bytes
    assert any(a.startswith("cache in") for a in read.assumed)


@pytest.mark.parametrize(
    ("gpu", "said", "format_", "cache_bytes"),
    [
        ("H100-80GB-SXM", "fp8", Precision.BF16, 2.0),
        ("H200-141GB-SXM", "bf16", Precision.BF16, 2.0),
        ("B200-180GB", "fp4", Precision.MXFP8, 1.0),
    ],
)
def test_a_model_released_in_four_bits_is_dequantised_where_tensor_cores_know_no_block_scales(
    gpu: str, said: str, format_: Precision, cache_bytes: float
) -> None:
    read = case(model=MOE | {"name": "GPT-OSS-120B"}, gpu=gpu, precision=said, kv_precision=None)
    assert (read.config.precision, read.weight_bytes) == (format_, 0.53125)
    assert read.workload.kv_bytes_per_element == cache_bytes


@pytest.mark.parametrize(
    ("changes", "requests", "noted"),
    [
        ({"num_requests": 700}, 700, False),
        ({}, None, False),  # no table names these lengths
        ({"isl": 1000, "osl": 1000}, 3000, True),
        ({"isl": 1000, "osl": 1000, "framework": "vLLM 0.8"}, None, False),
        ({"isl": 1000, "osl": 1000, "kind": "static_batch_latency", "batch": 4}, None, False),
    ],
)
def test_how_many_requests_were_sent_is_read_or_looked_up_or_left_open(
    changes: dict[str, Any], requests: int | None, noted: bool
) -> None:
    read = case(**changes)
    assert read.workload.requests == requests
    assert any("requests" in note for note in read.assumed) is noted


def test_out_of_memory_rows_are_judged_at_their_batch(tmp_path: Path) -> None:
    large = SERVING | {"kind": "oom", "isl": 4000, "batch": 100_000, "measured": {}}
    small = SERVING | {"kind": "static_batch_latency", "batch": 1, "measured": {"latency_ms": 900}}
    fit = validate_file(write(tmp_path / "s.jsonl", large, small)).metrics.fit
    assert (fit.true_oom, fit.true_fits, fit.n) == (1, 1, 2)


def test_training_and_serving_rows_may_stand_in_one_file(tmp_path: Path) -> None:
    report = validate_file(write(tmp_path / "s.jsonl", ROW, SERVING))
    assert [s.group.id for s in report.scored] == ["tiny-1", "serve-1"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "disaggregated_online"}, "kind disaggregated_online is not predicted"),
        ({"kind": "static_batch_latency"}, "batch is not stated"),
        ({"isl": None}, "isl or osl is not stated"),
        ({"precision": None}, "precision null is not known"),
        ({"kv_precision": "fp3"}, "kv_precision fp3 is not known"),
        ({"gpus": 3}, "tp x pp = 2 does not divide the 3 GPUs stated"),
        ({"ep": 7}, "ep 7 does not divide the 2 ranks of a stage"),
    ],
)
def test_a_serving_row_that_says_too_little_is_skipped_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(SkippedError, match=reason):
        case(**changes)
