"""The commands on good input: what they print, the documents they write, their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from meshwright.commands.scale import gpu_counts
from meshwright.plan import Plan

JOB = ["llama-3.1-8b", "--cluster", "h100-sxm", "--nodes", "1", "--seq", "4096", "--global-batch", "64"]
TOO_LARGE = ["llama-3.1-70b", "--cluster", "h100-sxm", "--nodes", "1", "--seq", "4096", "--global-batch", "64"]


def document(done: Any) -> Any:
    """The one JSON document on stdout, strict: NaN and Infinity are refused."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    assert done.err == ""
    return json.loads(done.out, parse_constant=refuse)


def test_plan_prints_a_ranked_table_with_reasons(meshwright: Callable[..., Any]) -> None:
    done = meshwright("plan", *JOB, "--top", "4")
    assert (done.code, done.err) == (0, "")
    for words in ("Best plans by throughput", "tok/s/GPU", "Why", "best: compute takes", "textbook rule",
                  "What one change would bring", "legal configurations"):  # fmt: skip
        assert words in done.out
    assert not any(line.endswith(" ") for line in done.out.splitlines())


def test_plan_json_has_the_promised_fields(meshwright: Callable[..., Any]) -> None:
    found = document(meshwright("plan", *JOB, "--json", "--top", "3"))
    assert len(found["plans"]) == 3
    assert found["search"]["feasible"] <= found["search"]["evaluated"]
    assert found["search"]["seconds"] > 0
    for plan in found["plans"]:
        assert plan.keys() >= {"config", "memory", "traffic", "time", "throughput", "efficiency", "reason"}
        rates = plan["throughput"]
        assert rates.keys() >= {"tokens_per_s_per_gpu", "model_tflops_per_gpu", "mfu", "hfu"}
        sizes = plan["config"]
        assert sizes["dp"] * sizes["tp"] * sizes["pp"] * sizes["cp"] == sizes["world_size"] == 8
        assert plan["memory"]["fits"]
        assert plan["memory"]["peak_bytes"] <= plan["memory"]["capacity_bytes"]
        assert sum(plan["time"]["parts_s"].values()) == pytest.approx(plan["time"]["step_s"])
        tokens = 64 * 4096 / plan["time"]["step_s"] / 8
        assert rates["tokens_per_s_per_gpu"] == pytest.approx(tokens)
    speeds = [plan["throughput"]["tokens_per_s_per_gpu"] for plan in found["plans"]]
    assert speeds == sorted(speeds, reverse=True)


def test_a_model_that_does_not_fit_is_a_no_with_what_would(meshwright: Callable[..., Any]) -> None:
    done = meshwright("plan", *TOO_LARGE)
    assert (done.code, done.err) == (1, "")
    assert "Nothing fits" in done.out
    assert "GPUs instead of 8" in done.out
    found = document(meshwright("plan", *TOO_LARGE, "--json"))
    assert found["plans"] == []
    assert found["nothing_fits"]["nearest"]["missing_bytes"] > 0
    assert any(remedy["gpus"] > 8 for remedy in found["nothing_fits"]["remedies"])


def test_sizes_given_to_plan_restrict_the_search(meshwright: Callable[..., Any]) -> None:
    found = document(meshwright("plan", *JOB, "--json", "--tp", "2,4", "--zero", "1", "--recompute", "full"))
    configs = [plan["config"] for plan in found["plans"]]
    assert {config["tp"] for config in configs} <= {2, 4}
    assert {config["zero"] for config in configs} == {1}
    assert {config["recompute"] for config in configs} == {"full"}


def test_the_memory_objective_needs_less_than_the_throughput_one(meshwright: Callable[..., Any]) -> None:
    fast, lean = (
        document(meshwright("plan", *JOB, "--json", "--top", "1", "--objective", objective))["plans"][0]
        for objective in ("throughput", "memory")
    )
    assert lean["memory"]["peak_bytes"] < fast["memory"]["peak_bytes"]
    assert lean["time"]["step_s"] <= fast["time"]["step_s"] / 0.9 * 1.001


def test_a_plan_has_the_schedules_of_the_software_it_assumes(meshwright: Callable[..., Any]) -> None:
    job = ("plan", "gpt3-175b", "--cluster", "a100-80gb", "--gpus", "64", "--seq", "2048", "--global-batch", "64")
    several = ("--pp", "8", "--top", "50", "--json")
    usual = document(meshwright(*job, *several))
    assert {plan["config"]["schedule"] for plan in usual["plans"]} <= {"1f1b", "interleaved-1f1b"}
    assert any("megatron-core (1f1b, interleaved-1f1b)" in note for note in usual["notes"])
    named = document(meshwright(*job, *several, "--schedule", "zb-h1"))
    assert any("megatron-core has no zb-h1" in note for note in named["notes"])
    ours = document(meshwright(*job, *several, "--stack", "meshwright"))
    assert not any("pipeline schedules are those" in note for note in ours["notes"])


def test_latency_without_requests_is_refused(meshwright: Callable[..., Any]) -> None:
    job = ("plan", "gpt2-xl", "--cluster", "h100-sxm", "--gpus", "8", "--seq", "1024", "--global-batch", "8")
    refused = meshwright(*job, "--objective", "latency")
    assert refused.code == 2
    assert "--objective latency is about serving: give --serve" in refused.err


def test_a_plan_file_gives_the_estimate_it_was_written_with(meshwright: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    best = document(meshwright("plan", *JOB, "--json", "-o", file))["plans"][0]
    again = document(meshwright("estimate", file, "--json"))
    assert again == {key: value for key, value in best.items() if key != "reason"}
    written = Plan.read(file)
    assert written.provenance is not None
    assert written.provenance.objective == "throughput"
    assert Plan.from_yaml(written.to_yaml()) == written


def test_plan_and_estimate_tell_of_the_proof_beside_a_plan_while_it_is_about_it(
    meshwright: Callable[..., Any], tmp_path: Path
) -> None:
    file, proof = tmp_path / "plan.yaml", tmp_path / "plan.proof.json"
    assert "proof" not in document(meshwright("plan", *JOB, "--json", "-o", file))
    proof.write_text(json.dumps({"digest": Plan.read(file).digest(), "agrees": True}))
    assert document(meshwright("plan", *JOB, "--json", "-o", file))["proof"] == "proved by a dry run (plan.proof.json)"
    assert "proved by a dry run" in meshwright("estimate", file).out
    proof.write_text(json.dumps({"digest": "of another plan", "agrees": True}))
    assert "not proved: the plan has changed" in meshwright("plan", *JOB, "-o", file).out


def test_a_plan_asks_for_context_parallelism_by_all_to_all(meshwright: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    assert meshwright("estimate", *JOB, "--cp", "2", "--zero", "3", "--cp-variant", "all_to_all", "-o", file).code == 0
    assert Plan.read(file).parallel.cp_variant == "all_to_all"
    (cp,) = [p for p in document(meshwright("layout", file, "--json"))["communication"] if p["axis"] == "cp"]
    assert cp["collective"].startswith("all-to-all")
    assert document(meshwright("estimate", file, "--json"))["config"]["cp_variant"] == "all_to_all"
    refused = meshwright("estimate", file, "--cp", "8", "--tp", "8", "--nodes", "8")
    assert refused.code == 2
    assert refused.err.endswith(
        "does not divide the 4 attention heads that tp=8 leaves a rank; try 4, or cp_variant ring\n"
    )


def test_options_replace_what_a_plan_file_says(meshwright: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    assert meshwright("estimate", *JOB, "--tp", "2", "--zero", "1", "-o", file).code == 0
    changed = document(meshwright("estimate", file, "--json", "--tp", "4", "--recompute", "full"))
    assert (changed["config"]["tp"], changed["config"]["dp"]) == (4, 2)
    assert changed["config"]["recompute"] == "full"
    larger = document(meshwright("estimate", file, "--json", "--nodes", "2"))
    assert (larger["config"]["tp"], larger["config"]["world_size"]) == (2, 16)


def test_estimate_says_by_how_much_it_does_not_fit(meshwright: Callable[..., Any]) -> None:
    done = meshwright("estimate", *TOO_LARGE, "--tp", "8")
    assert done.code == 1
    assert "Does not fit" in done.out
    assert "GiB too much" in done.out


def test_estimate_tables_add_up(meshwright: Callable[..., Any]) -> None:
    found = document(meshwright("estimate", *JOB, "--tp", "2", "--pp", "2", "--zero", "1", "--json"))
    for stage in found["memory"]["stages"]:
        assert sum(stage["bytes_by_kind"].values()) == stage["total_bytes"]
    product = 1.0
    for factor in found["efficiency"].values():
        product *= factor
    assert product == pytest.approx(found["throughput"]["mfu"])
    assert {line["axis"] for line in found["traffic"]} >= {"tp", "pp", "dp"}


def test_replicas_follow_from_the_cluster_and_the_cluster_from_replicas(meshwright: Callable[..., Any]) -> None:
    job = ["estimate", "llama-3.1-8b", "--cluster", "h100-sxm", "--seq", "4096", "--tp", "2", "--json"]
    assert document(meshwright(*job, "--nodes", "2"))["config"]["dp"] == 8
    assert document(meshwright(*job, "--dp", "12"))["config"]["world_size"] == 24


def test_virtual_stages_imply_their_schedule(meshwright: Callable[..., Any]) -> None:
    job = ["estimate", *JOB, "--pp", "2", "--json"]
    assert document(meshwright(*job, "--vpp", "2"))["config"]["schedule"] == "interleaved-1f1b"
    assert document(meshwright(*job, "--schedule", "zbv"))["config"]["vpp"] == 2


def test_layout_draws_the_guides_map(meshwright: Callable[..., Any]) -> None:
    done = meshwright("layout", "--tp", "4", "--pp", "4", "--dp", "4")
    assert (done.code, done.err) == (0, "")
    for words in ("stage pp=1: [ 4  5  6  7]", "replica dp=1", "16 17 18 19", "node 0", "all-reduce"):
        assert words in done.out


def test_layout_json_lists_groups_that_cover_all_ranks(meshwright: Callable[..., Any]) -> None:
    found = document(meshwright("layout", "--tp", "4", "--pp", "2", "--dp", "3", "--order", "megatron", "--json"))
    for axis in ("tp", "pp", "dp"):
        assert sorted(rank for group in found["groups"][axis] for rank in group) == list(range(24))
    assert len(found["coordinates"]["tp"]) == 24


def test_layout_fills_in_bytes_for_a_model_and_for_a_plan(meshwright: Callable[..., Any], tmp_path: Path) -> None:
    sizes = ["--tp", "4", "--dp", "2", "--global-batch", "8"]
    by_model = document(meshwright("layout", *sizes, "--model", "llama-3.1-8b", "--seq", "4096", "--json"))
    tp = next(line for line in by_model["communication"] if line["axis"] == "tp")
    assert tp["bytes_per_call"] > 0
    assert tp["calls_per_step"] > 0
    file = tmp_path / "plan.yaml"
    job = ["llama-3.1-8b", "--cluster", "h100-sxm", "--nodes", "1", "--seq", "4096", "--global-batch", "8"]
    assert meshwright("estimate", *job, "--tp", "4", "-o", file).code == 0
    by_plan = document(meshwright("layout", file, "--json"))
    assert by_plan["communication"] == by_model["communication"]


def test_scale_reports_every_size_and_draws_it(meshwright: Callable[..., Any]) -> None:
    job = [
        "scale",
        "llama-3.1-8b",
        "--cluster",
        "h100-sxm",
        "--seq",
        "4096",
        "--global-batch",
        "256",
        "--gpus",
        "8..64",
    ]
    done = meshwright(*job)
    assert (done.code, done.err) == (0, "")
    assert "efficiency" in done.out
    assert "●" in done.out
    found = document(meshwright(*job, "--json"))
    assert [point["gpus"] for point in found["points"]] == [8, 16, 32, 64]
    assert [point["global_batch"] for point in found["points"]] == [32, 64, 128, 256]
    assert {"tp", "pp", "dp"} <= found["points"][0]["factors"].keys()
    strong = document(meshwright(*job, "--json", "--strong"))
    assert {point["global_batch"] for point in strong["points"]} == {256}


@pytest.mark.parametrize(
    ("text", "counts"), [("8..64", [8, 16, 32, 64]), ("8..48", [8, 16, 32, 48]), ("64,8", [64, 8]), ("7", [7])]
)
def test_ranges_of_gpus_double(text: str, counts: list[int]) -> None:
    assert gpu_counts(text) == counts


def test_catalogues_are_listed(meshwright: Callable[..., Any]) -> None:
    models = document(meshwright("models", "--json"))["models"]
    assert len(models) >= 40
    assert next(m for m in models if m["name"] == "llama-3.1-70b")["parameters"] == 70_553_706_496
    clusters = document(meshwright("clusters", "--json"))["clusters"]
    assert {"h100-sxm", "a100-80gb", "gb200-nvl72", "mi300x", "cpu"} <= {c["name"] for c in clusters}
    assert "deepseek-v3" in meshwright("models").out
    assert "h100-sxm" in meshwright("clusters").out


def test_help_names_every_command(meshwright: Callable[..., Any]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        done = meshwright(*arguments)
        assert (done.code, done.err) == (0, "")
        for command in ("plan", "estimate", "layout", "scale", "validate", "models", "clusters"):
            assert command in done.out


def test_the_version_is_that_of_the_package(meshwright: Callable[..., Any]) -> None:
    done = meshwright("--version")
    assert (done.code, done.out, done.err) == (0, f"meshwright {version('meshwright')}\n", "")


def test_python_m_meshwright_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "meshwright", "layout", "--tp", "2"], capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "tp 2" in done.stdout


def test_a_command_imports_no_other_command() -> None:
    code = (
        "import sys\n"
        "from meshwright.cli import main\n"
        "assert main(['clusters']) == 0\n"
        "loaded = [name for name in sys.modules if name.startswith('meshwright.commands.')]\n"
        "print(sorted(loaded), file=sys.stderr)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "meshwright.commands.catalogues" in run.stderr
    assert "meshwright.commands.doctor" not in run.stderr
    assert "meshwright.commands.plan" not in run.stderr
