"""Serving through the commands: plan --serve, its plan file, its refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

JOB = [
    "plan",
    "llama-3.1-70b",
    "--cluster",
    "h100-sxm",
    "--nodes",
    "1",
    "--serve",
    "--prompt",
    "1024",
    "--output",
    "256",
]


def test_the_ways_to_serve_are_ranked_with_reasons(meshwright: Callable[..., Any]) -> None:
    done = meshwright(*JOB)
    assert (done.code, done.err) == (0, "")
    for words in ("Best ways to serve by throughput", "first token", "per token", "Why", "textbook rule"):
        assert words in done.out


def test_the_serving_document_has_plans_and_search(meshwright: Callable[..., Any]) -> None:
    found = json.loads(meshwright(*JOB, "--json").out)
    speeds = [plan["throughput"]["tokens_per_s_per_gpu"] for plan in found["plans"]]
    assert speeds == sorted(speeds, reverse=True)
    assert found["search"].keys() >= {"evaluated", "feasible", "seconds"}
    for plan in found["plans"]:
        memory = plan["memory"]
        assert memory["fits"]
        held = memory["weights_bytes"] + memory["workspace_bytes"]
        held += memory["cache_bytes_per_sequence"] * memory["max_sequences"]
        assert held <= memory["capacity_bytes"]
        sizes = plan["config"]
        assert sizes["dp"] * sizes["pp"] * sizes["tp"] == 8


def test_latency_asks_for_more_tensor_parallelism_than_throughput(meshwright: Callable[..., Any]) -> None:
    fast, busy = (
        json.loads(meshwright(*JOB, "--json", "--objective", objective).out)["plans"][0]
        for objective in ("latency", "throughput")
    )
    assert fast["time"]["tpot_s"] < busy["time"]["tpot_s"]
    assert fast["config"]["tp"] >= busy["config"]["tp"]


def test_targets_are_kept(meshwright: Callable[..., Any]) -> None:
    found = json.loads(meshwright(*JOB, "--json", "--tpot-ms", "30").out)
    assert found["plans"]
    assert all(plan["time"]["tpot_s"] <= 0.030 * 1.0001 for plan in found["plans"])


def test_the_number_of_sequences_that_keeps_a_target_reaches_the_plan_and_vllm(
    meshwright: Callable[..., Any], tmp_path: Path
) -> None:
    """Without it vLLM would run as many as its cache holds, and miss the target."""
    file = tmp_path / "serve.yaml"
    best = json.loads(meshwright(*JOB, "--tpot-ms", "30", "--json", "-o", file).out)["plans"][0]
    again = json.loads(meshwright("estimate", file, "--json").out)
    assert again == {key: value for key, value in best.items() if key != "reason"}
    limit = meshwright("export", file, "--to", "vllm").out.split("--max-num-seqs ")[1].split()[0]
    assert f"batch: {limit}\n" in file.read_text()
    assert meshwright("estimate", file).out.count(f"KV cache of {limit} sequences") == 1


def test_targets_that_nothing_keeps_are_a_no(meshwright: Callable[..., Any]) -> None:
    done = meshwright(*JOB, "--tpot-ms", "0.001")
    assert (done.code, done.err) == (1, "")
    assert "nothing keeps the targets" in done.out


def test_a_model_that_no_replica_holds_is_a_no(meshwright: Callable[..., Any]) -> None:
    found = meshwright("plan", "deepseek-v3", *JOB[2:])
    assert (found.code, found.err) == (1, "")
    assert "GPUs hold it" in found.out


def test_a_serving_plan_file_is_estimated_as_it_was_found(meshwright: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    best = json.loads(meshwright(*JOB, "--json", "-o", file).out)["plans"][0]
    again = json.loads(meshwright("estimate", file, "--json").out)
    assert again == {key: value for key, value in best.items() if key != "reason"}
    assert "KV cache" in meshwright("estimate", file).out


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--seq", "4096"], "--seq is about training"),
        (["--zero", "1"], "--zero is about training"),
        (["--tpot-ms", "0"], "milliseconds above zero"),
        (["--tpot-ms", "nan"], "milliseconds above zero"),
        (["--stack", "nonsense"], "unknown serving engine"),
        (["--tp", "3"], "no split"),
    ],
)
def test_what_makes_no_sense_is_refused(meshwright: Callable[..., Any], extra: list[str], words: str) -> None:
    done = meshwright(*JOB, *extra)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert words in done.err


def test_requests_without_serve_are_refused(meshwright: Callable[..., Any]) -> None:
    done = meshwright(*[word for word in JOB if word != "--serve"])
    assert (done.code, done.out, done.err) == (2, "", "meshwright: --prompt is about serving: give --serve too\n")


def test_formats_prefixes_and_chunks_reach_the_plan_and_vllm(meshwright: Callable[..., Any], tmp_path: Path):
    plan = tmp_path / "plan.yaml"
    asked = ("--serve", "--cluster", "h100-sxm", "--nodes", 1, "--prompt", 1024, "--output", 256)
    formats = ("--kv-format", "fp8", "--weight-format", "int4", "--prefix-hit-rate", 0.5, "--pass-tokens", 2048)
    done = meshwright("plan", "llama-3.1-8b", *asked, *formats, "--plot", "-o", plan)
    assert done.code == 0, done.err
    assert "vLLM's KV cache under plan 1" in done.out
    assert "tokens/s per user" in done.out
    shown = meshwright("serve", plan, "--show", "--json")
    command = json.loads(shown.out)["processes"][0]["command"]
    assert "--kv-cache-dtype fp8" in command
    assert "--max-num-batched-tokens 2048" in command
    assert meshwright("estimate", plan).code == 0


def test_serving_options_that_cannot_be_are_one_line(meshwright: Callable[..., Any]):
    asked = ("plan", "llama-3.1-8b", "--serve", "--cluster", "h100-sxm", "--prompt", 64, "--output", 64)
    for option, value in (("--kv-format", "fp5"), ("--weight-format", "q8"), ("--prefix-hit-rate", 1.0)):
        done = meshwright(*asked, option, value)
        assert done.code == 2
        assert option in done.err


def test_a_checkpoint_of_eight_bits_is_planned_in_eight_bits_unless_told_otherwise(
    meshwright: Callable[..., Any], tmp_path: Path
) -> None:
    job = [word if word != "llama-3.1-70b" else "qwen3-32b-fp8" for word in JOB]
    stored = meshwright(*job, "-o", tmp_path / "plan.yaml")
    assert stored.code == 0
    assert "served in fp8" in stored.out
    assert "precision: fp8" in (tmp_path / "plan.yaml").read_text()
    wide = json.loads(meshwright(*job, "--precision", "bf16", "--json").out)["plans"][0]
    assert wide["config"]["precision"] == "bf16"


def test_two_pools_are_planned_beside_one_and_written_as_two_plans(
    meshwright: Callable[..., Any], tmp_path: Path
) -> None:
    done = meshwright(*JOB, "--disaggregated", "--tpot-ms", "30", "-o", tmp_path / "plan.yaml")
    assert (done.code, done.err) == (0, "")
    for words in ("Best pairs of pools", "of cache per prompt", "of transfer", "Two pools or one", "times as good"):
        assert words in done.out
    for pool, role in (("prefill", "kv_producer"), ("decode", "kv_consumer")):
        plan = tmp_path / f"plan.{pool}.yaml"
        exported = meshwright("export", plan, "--to", "vllm")
        assert exported.code == 0
        assert role in exported.out
        assert "no pool has been started" in exported.err
        assert meshwright("estimate", plan).code == 2


def test_the_document_of_two_pools_says_what_a_prompt_moves(meshwright: Callable[..., Any]) -> None:
    words = (*JOB, "--disaggregated", "--tpot-ms", "30", "--top", "1", "--json")
    whole, parts = (json.loads(meshwright(*words, "--kv-transfer", kind).out) for kind in ("at-end", "by-layer"))
    moved, hidden = whole["plans"][0]["transfer"], parts["plans"][0]["transfer"]
    assert moved["bytes_per_request"] == 1024 * 2 * 8 * 128 * 2 * 80
    assert moved["exposed_s"] == moved["transfer_s"] > hidden["exposed_s"]
    assert whole["gain_over_aggregated"] > 1
    assert whole["aggregated"]["meets_targets"]


@pytest.mark.parametrize(
    "words",
    [
        ("--disaggregated", "--objective", "latency"),
        ("--disaggregated", "--dp", "2"),
        ("--disaggregated", "--kv-transfer", "never"),
        ("--kv-transfer", "at-end"),
        ("--disaggregated", "--plot"),
    ],
)
def test_what_two_pools_do_not_take_is_one_line(meshwright: Callable[..., Any], words: tuple[str, ...]) -> None:
    done = meshwright(*JOB, *words)
    assert done.code == 2
    assert len(done.err.strip().splitlines()) == 1
