"""Bad input of every kind: exit code 2, nothing on stdout, exactly one line on stderr, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ON = ["--cluster", "h100-sxm", "--nodes", "1"]
JOB = [*ON, "--seq", "4096", "--global-batch", "64"]
PLAN, ESTIMATE = ["plan", "llama-3.1-8b"], ["estimate", "llama-3.1-8b"]
SIZES = ("0", "-1", "-99999999999", "1.5", "1e3", "", " ", "four", "nan", "inf", "99999999999999999999", "0x10", "１")


def refused(done: Any) -> str:
    """The message, after checking that the refusal has the one form."""
    assert done.code == 2, (done.code, done.out, done.err)
    assert done.out == ""
    assert done.err.startswith("meshwright: ")
    assert done.err.count("\n") == 1
    assert done.err.endswith("\n")
    assert "Traceback" not in done.err
    assert len(done.err) < 800
    return done.err


@pytest.mark.parametrize("value", SIZES)
@pytest.mark.parametrize(
    "option", ["--nodes", "--gpus", "--gpus-per-node", "--seq", "--global-batch", "--tp", "--zero"]
)
def test_sizes_that_are_no_sizes_are_refused_by_plan(meshwright: Callable[..., Any], option: str, value: str) -> None:
    kept = [word for pair in zip(JOB[::2], JOB[1::2], strict=True) if pair[0] != option for word in pair]
    if option == "--zero" and value == "0":
        return  # ZeRO-0 is a stage
    if option == "--gpus":
        kept = [word for word in kept if word not in ("--nodes", "1")]
    refused(meshwright(*PLAN, *kept, option, value))


@pytest.mark.parametrize("value", SIZES)
@pytest.mark.parametrize("option", ["--dp", "--pp", "--cp", "--ep", "--vpp", "--micro-batch", "--recompute-every"])
def test_sizes_that_are_no_sizes_are_refused_by_estimate(
    meshwright: Callable[..., Any], option: str, value: str
) -> None:
    refused(meshwright(*ESTIMATE, *JOB, option, value))


WRONG: dict[str, list[str]] = {
    "no such command": ["plam", "llama-3.1-8b"],
    "no such option": [*PLAN, *JOB, "--tensor", "4"],
    "an option without its value": [*PLAN, *JOB, "--tp"],
    "no model": ["plan"],
    "two models": ["plan", "llama-3.1-8b", "gpt2", *JOB],
    "no cluster": [*PLAN, "--seq", "4096", "--global-batch", "64"],
    "no sequence": [*PLAN, *ON, "--global-batch", "64"],
    "no batch": [*PLAN, *ON, "--seq", "4096"],
    "an empty model": ["plan", "", *JOB],
    "an unknown model": ["plan", "llama-3.1-71b", *JOB],
    "a plan for a model": ["plan", "examples/tiny-llama-2x2x2.yaml", *JOB],
    "an unknown model with a path": ["plan", "no/such/place/config.json", *JOB],
    "a model name with a null byte": ["plan", "llama\0", *JOB],
    "a very long model name": ["plan", "x" * 100_000, *JOB],
    "an unknown cluster": [*PLAN, "--cluster", "h100-sxn", *JOB[2:]],
    "an empty cluster": [*PLAN, "--cluster", "", *JOB[2:]],
    "a missing cluster file": [*PLAN, "--cluster", "./no-such.toml", *JOB[2:]],
    "an unknown objective": [*PLAN, *JOB, "--objective", "cheapest"],
    "an unknown schedule": [*ESTIMATE, *JOB, "--schedule", "2f2b"],
    "an unknown recompute mode": [*ESTIMATE, *JOB, "--recompute", "some"],
    "an unknown precision": [*ESTIMATE, *JOB, "--precision", "fp7"],
    "a precision that the device lacks": [*ESTIMATE, "--cluster", "v100", *JOB[2:], "--precision", "fp8"],
    "an unknown optimizer": [*ESTIMATE, *JOB, "--optimizer", "adamw9"],
    "an unknown stack": [*ESTIMATE, *JOB, "--stack", "megatron-kore"],
    "a ZeRO stage that does not exist": [*ESTIMATE, *JOB, "--zero", "4"],
    "tp that does not divide the heads": [*ESTIMATE, "--cluster", "h100-sxm", "--gpus", "24", *JOB[4:], "--tp", "3"],
    "tp that does not divide the GPUs": [*ESTIMATE, *JOB, "--tp", "16"],
    "sizes that do not multiply to the GPUs": [*ESTIMATE, *JOB, "--tp", "2", "--dp", "2"],
    "more stages than layers": [*ESTIMATE, "--cluster", "h100-sxm", "--gpus", "64", *JOB[4:], "--pp", "64"],
    "experts of a dense model": [*ESTIMATE, *JOB, "--ep", "2"],
    "a batch that replicas do not divide": [*ESTIMATE, *ON, "--seq", "4096", "--global-batch", "63"],
    "a batch that microbatches do not divide": [*ESTIMATE, *JOB, "--micro-batch", "3"],
    "virtual stages without a pipeline": [*ESTIMATE, *JOB, "--vpp", "2"],
    "virtual stages of plain 1f1b": [*ESTIMATE, *JOB, "--pp", "2", "--vpp", "2", "--schedule", "1f1b"],
    "shards that do not divide the replicas": [*ESTIMATE, *JOB, "--zero", "3", "--zero-shards", "3"],
    "GPUs that fill no whole nodes": [*ESTIMATE, "--cluster", "h100-sxm", "--gpus", "13", *JOB[4:]],
    "GPUs that are not nodes times size": [*ESTIMATE, *JOB, "--gpus", "4000"],
    "negative reserved memory": [*ESTIMATE, *JOB, "--reserved-gib", "-1"],
    "reserved memory that is no number": [*ESTIMATE, *JOB, "--reserved-gib", "nan"],
    "more reserved than there is": [*ESTIMATE, *JOB, "--reserved-gib", "100"],
    "infinite reserved memory": [*ESTIMATE, *JOB, "--reserved-gib", "inf"],
    "no plans wanted": [*PLAN, *JOB, "--top", "0"],
    "a tp that no search allows": [*PLAN, *JOB, "--tp", "3"],
    "a fixed size larger than the cluster": [*PLAN, *JOB, "--dp", "16"],
    "a list of sizes with a hole": [*PLAN, *JOB, "--tp", "2,,4"],
    "layout of no ranks": ["layout", "--tp", "0"],
    "layout of too many ranks": ["layout", "--tp", "9999999", "--dp", "9999999"],
    "layout in an unknown order": ["layout", "--tp", "2", "--dp", "2", "--order", "tp-xp"],
    "layout in an order that names an axis twice": ["layout", "--tp", "2", "--dp", "2", "--order", "tp-tp-dp"],
    "layout in an order that leaves an axis out": ["layout", "--tp", "2", "--dp", "2", "--order", "tp-pp"],
    "layout with a model but no sequence": ["layout", "--tp", "2", "--model", "llama-3.1-8b"],
    "layout of an unknown model": ["layout", "--tp", "2", "--model", "nonsense", "--seq", "128"],
    "scale of a falling range": ["scale", "llama-3.1-8b", *JOB[:2], *JOB[4:], "--gpus", "64..8"],
    "scale of words": ["scale", "llama-3.1-8b", *JOB[:2], *JOB[4:], "--gpus", "few..many"],
    "scale from zero": ["scale", "llama-3.1-8b", *JOB[:2], *JOB[4:], "--gpus", "0..8"],
    "scale to the stars": ["scale", "llama-3.1-8b", *JOB[:2], *JOB[4:], "--gpus", "8..99999999999"],
    "scale of half nodes": ["scale", "llama-3.1-8b", *JOB[:2], *JOB[4:], "--gpus", "12,20"],
    "a missing file of rows": ["validate", "no-such.jsonl"],
    "a folder of rows": ["validate", "."],
    "an unwritable plan": [*ESTIMATE, *JOB, "-o", "/no/such/folder/plan.yaml"],
    "a folder as plan": [*ESTIMATE, *JOB, "-o", "/"],
    "a missing plan": ["estimate", "no-such-plan.yaml"],
}


@pytest.mark.parametrize("what", WRONG)
def test_it_is_refused_in_one_line(meshwright: Callable[..., Any], what: str) -> None:
    refused(meshwright(*WRONG[what]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (WRONG["tp that does not divide the heads"], ["tp=3", "32 attention heads", "2 or 4"]),
        (WRONG["an unknown model"], ["llama-3.1-70b"]),
        (WRONG["an unknown cluster"], ["h100-sxm"]),
        (WRONG["an unknown stack"], ["megatron-core"]),
        (WRONG["GPUs that fill no whole nodes"], ["8 or 16"]),
        (WRONG["no such option"], ["--tensor"]),
        (WRONG["no such command"], ["plan"]),
    ],
)
def test_the_line_names_the_nearest_valid_values(
    meshwright: Callable[..., Any], arguments: list[str], words: list[str]
) -> None:
    message = refused(meshwright(*arguments))
    assert all(word in message for word in words), message


PLAN_TEXT = """\
version: 1
model: llama-3.1-8b
cluster: {name: h100-sxm, nodes: 1}
workload: {seq: 4096}
parallel: {dp: 1, tp: 8, micro_batch: 1, global_batch: 8, zero: 1}
"""
HOSTILE_PLANS: dict[str, str | bytes] = {
    "empty": "",
    "truncated": PLAN_TEXT[:60] + "\nparallel: {dp: ",
    "a list": "[1, 2, 3]",
    "a number": "7",
    "binary": bytes(range(256)),
    "unknown key": PLAN_TEXT + "colour: blue\n",
    "misspelt size": PLAN_TEXT.replace("tp: 8", "tpp: 8"),
    "text size": PLAN_TEXT.replace("tp: 8", "tp: eight"),
    "boolean size": PLAN_TEXT.replace("tp: 8", "tp: true"),
    "float size": PLAN_TEXT.replace("tp: 8", "tp: 8.5"),
    "zero size": PLAN_TEXT.replace("tp: 8", "tp: 0"),
    "negative size": PLAN_TEXT.replace("tp: 8", "tp: -8"),
    "huge size": PLAN_TEXT.replace("tp: 8", f"tp: {10**40}"),
    "nan": PLAN_TEXT.replace("seq: 4096", "seq: .nan"),
    "infinite": PLAN_TEXT.replace("seq: 4096", "seq: .inf"),
    "missing model": PLAN_TEXT.replace("model: llama-3.1-8b\n", ""),
    "missing workload": PLAN_TEXT.replace("workload: {seq: 4096}\n", ""),
    "another version": PLAN_TEXT.replace("version: 1", "version: 99"),
    "unknown model": PLAN_TEXT.replace("llama-3.1-8b", "llama-3.1-9b"),
    "unknown cluster": PLAN_TEXT.replace("h100-sxm", "h100-smx"),
    "unknown schedule": PLAN_TEXT.replace("zero: 1", "schedule: fast"),
    "a python object": "!!python/object/apply:os.system ['echo hacked']",
    "a billion laughs": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "deep nesting": "[" * 5000 + "]" * 5000,
    "deep mapping": "model: " + "{a: " * 3000 + "1" + "}" * 3000,
    "many megabytes": "# " + "x" * (2 << 20),
    "sizes for another world": PLAN_TEXT.replace("dp: 1", "dp: 3"),
    "stages that do not exist": PLAN_TEXT.replace("tp: 8", "pp: 8, vpp: 9, schedule: interleaved-1f1b"),
}


@pytest.mark.parametrize("kind", HOSTILE_PLANS)
def test_hostile_plan_files_are_refused(meshwright: Callable[..., Any], kind: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    content = HOSTILE_PLANS[kind]
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(meshwright("estimate", file))


def test_the_plan_that_hostile_ones_are_made_from_is_good(meshwright: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(PLAN_TEXT)
    assert meshwright("estimate", file).code == 0


LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 128,
    "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


def config_text(**changes: Any) -> str:
    return json.dumps({**LLAMA, **changes})


HOSTILE_CONFIGS: dict[str, str | bytes] = {
    "empty": "",
    "truncated": config_text()[:40],
    "a list": "[]",
    "null": "null",
    "binary": bytes(range(256)),
    "no model type": json.dumps({"hidden_size": 64}),
    "unknown model type": config_text(model_type="wizard"),
    "model type of the wrong type": config_text(model_type=["llama"]),
    "hidden as text": config_text(hidden_size="64"),
    "hidden as boolean": config_text(hidden_size=True),
    "hidden zero": config_text(hidden_size=0),
    "hidden negative": config_text(hidden_size=-64),
    "hidden huge": config_text(hidden_size=10**30),
    "hidden infinite": config_text(hidden_size=float("inf")),
    "hidden nan": config_text(hidden_size=float("nan")),
    "hidden null": config_text(hidden_size=None),
    "layers huge": config_text(num_hidden_layers=10**12),
    "heads that do not divide": config_text(num_attention_heads=7),
    "nested deeply": "[" * 100_000 + "]" * 100_000,
    "many megabytes": '{"a": "' + "x" * (20 << 20) + '"}',
}


@pytest.mark.parametrize("kind", HOSTILE_CONFIGS)
def test_hostile_model_configs_are_refused(meshwright: Callable[..., Any], kind: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    content = HOSTILE_CONFIGS[kind]
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(meshwright("plan", file, *JOB))


def test_the_config_that_hostile_ones_are_made_from_is_good(meshwright: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(config_text())
    done = meshwright("estimate", file, *ON, "--seq", "128", "--global-batch", "8")
    assert (done.code, done.err) == (0, "")


CLUSTER_TEXT = """\
[clusters.mine]
accelerator = "h100-80gb-sxm"
gpus_per_node = 8
intra = "nvlink4"
inter = "ib-ndr"
"""
HOSTILE_CLUSTERS: dict[str, str] = {
    "empty": "",
    "not TOML": "{{{{",
    "no cluster in it": "[links.fast]\nbandwidth = 1e9\nlatency_s = 1e-6\n",
    "unknown section": "[clouds.mine]\nx = 1\n",
    "unknown accelerator": CLUSTER_TEXT.replace("h100-80gb-sxm", "h100-81gb-sxm"),
    "unknown key": CLUSTER_TEXT + "colour = 'blue'\n",
    "text for a number": CLUSTER_TEXT.replace("gpus_per_node = 8", "gpus_per_node = 'eight'"),
    "boolean for a number": CLUSTER_TEXT.replace("gpus_per_node = 8", "gpus_per_node = true"),
    "zero": CLUSTER_TEXT.replace("gpus_per_node = 8", "gpus_per_node = 0"),
    "negative": CLUSTER_TEXT.replace("gpus_per_node = 8", "gpus_per_node = -8"),
    "infinite": CLUSTER_TEXT.replace("gpus_per_node = 8", "gpus_per_node = 8\noversubscription = inf"),
    "nan": CLUSTER_TEXT.replace("gpus_per_node = 8", "gpus_per_node = 8\noversubscription = nan"),
}


@pytest.mark.parametrize("kind", HOSTILE_CLUSTERS)
def test_hostile_cluster_files_are_refused(meshwright: Callable[..., Any], kind: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(HOSTILE_CLUSTERS[kind])
    refused(meshwright(*ESTIMATE, "--cluster", file, "--gpus", "8", "--seq", "4096"))


def test_a_cluster_file_of_very_deep_keys_is_refused_at_once(meshwright: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text("a" + ".a" * 50_000 + " = 1\n")
    assert "nested too deeply" in refused(meshwright(*ESTIMATE, "--cluster", file, "--gpus", "8", "--seq", "4096"))


@pytest.mark.parametrize("option", ["-o", "--trace"])
def test_a_device_is_never_replaced_by_a_file(meshwright: Callable[..., Any], option: str, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    done = meshwright(*ESTIMATE, *JOB, option, pipe)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert pipe.is_fifo()


@pytest.mark.parametrize("line", ["{", "[]", "7", '{"id": 1}' + "}" * 3, '{"tp": NaN,', "\x00"])
def test_malformed_rows_are_refused(meshwright: Callable[..., Any], line: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(line + "\n")
    refused(meshwright("validate", file))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "meshwright", *arguments]


def test_the_installed_command_refuses_in_one_line_too() -> None:
    done = subprocess.run(
        command(*ESTIMATE, *JOB, "--tp", "x"), capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_a_reader_that_leaves_early_causes_no_noise() -> None:
    with subprocess.Popen(command("models"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0


def test_a_full_disk_is_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command("clusters"), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "No space left" in done.stderr


INTERRUPTED = """
import os, signal, sys, threading
from meshwright.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it
threading.Timer(float(sys.argv[1]), os.kill, (os.getpid(), signal.SIGINT)).start()
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("after_s", [0.05, 0.6])
def test_an_interrupt_is_one_line(after_s: float) -> None:
    job = ["--cluster", "a100-80gb", "--gpus", "8..16384", "--seq", "2048", "--global-batch", "6144"]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(after_s), "scale", "gpt-3-175b", *job],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "meshwright: interrupted\n")
