"""aiconfigurator (PyPI) on the saturation rows of TensorRT-LLM: its own numbers, unpatched.

In: the raw rows. Out: predicted output tokens/s per GPU per row id, its refusals, and what it could not be asked. It
takes seconds per job, so jobs are asked in a random order within a time, and answers are kept: what has been asked is
a fair sample, and a second run goes on.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.accuracy.environments import UnavailableError, python_of
from tools.accuracy.store import BUILD, replace_text

VERSION = "0.12.0"
ENVIRONMENT = "aiconfigurator"
PEER = Path(__file__).with_name("aiconfigurator_peer.py")
SAVE_EVERY = 10
SEED = 8

SYSTEMS = {
    "A100-80GB-SXM": "a100_sxm",
    "H100-80GB-SXM": "h100_sxm",
    "H200-141GB-SXM": "h200_sxm",
    "B200-180GB": "b200_sxm",
    "GB200-192GB": "gb200",
    "L40S-48GB": "l40s",
    "RTX6000Pro-96GB-PCIe": "rtx_pro_6000_server",
}
MODELS = {
    "Llama-3.1-8B": "meta-llama/Meta-Llama-3.1-8B",
    "Llama-3.1-70B": "meta-llama/Meta-Llama-3.1-70B",
    "Llama-3.1-405B": "meta-llama/Meta-Llama-3.1-405B",
    "Mixtral-8x7B": "mistralai/Mixtral-8x7B-v0.1",
    "Qwen3-30B-A3B": "Qwen/Qwen3-30B-A3B",
    "Qwen3-235B-A22B": "Qwen/Qwen3-235B-A22B",
    "DeepSeek-R1": "deepseek-ai/DeepSeek-R1",
    "GPT-OSS-120B": "openai/gpt-oss-120b",
}
FORMATS = {
    # precision of the row -> (format of its dense products, of its experts)
    "fp16": ("bfloat16", "bfloat16"),
    "fp8": ("fp8", "fp8"),
    "nvfp4": ("nvfp4", "nvfp4"),
    "fp4": ("bfloat16", "w4a16_mxfp4"),
}
CACHES = {"fp16": "bfloat16", "bf16": "bfloat16", "fp8": "fp8", "int8": "int8"}


@dataclass(frozen=True)
class Answers:
    """By row id: output tokens/s per GPU; counts of refusals, of what it has no data for, and of jobs not reached."""

    rate: dict[str, float]
    refused: dict[str, int]
    not_asked: dict[str, int]
    left: int


def answers(lines: Iterable[Mapping[str, Any]], seconds: float, say: Callable[[str], None]) -> Answers:
    """What it says of the rows, asking for at most `seconds` more than what is kept."""
    jobs = {line["id"]: job_of(line) for line in lines if line.get("kind") == "throughput"}
    asked = {row: json.dumps(job, sort_keys=True) for row, job in jobs.items() if isinstance(job, dict)}
    digest = hashlib.sha256(PEER.read_bytes() + VERSION.encode()).hexdigest()[:16]
    store = BUILD / f"aiconfigurator-{digest}.json"
    known: dict[str, float | str] = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    missing = sorted(set(asked.values()) - known.keys())
    random.Random(SEED).shuffle(missing)
    if missing and seconds > 0:
        say(f"aiconfigurator {VERSION}: {len(missing)} jobs, at most {seconds:.0f} s")
        _ask(missing, seconds, known, store, say)
    found = {row: known[job] for row, job in asked.items() if job in known}
    return Answers(
        rate={row: answer for row, answer in found.items() if isinstance(answer, float)},
        refused=dict(Counter(answer for answer in found.values() if isinstance(answer, str)).most_common()),
        not_asked=dict(Counter(job for job in jobs.values() if isinstance(job, str)).most_common()),
        left=len(asked) - len(found),
    )


def job_of(line: Mapping[str, Any]) -> dict[str, Any] | str:
    """The row in its words, or what it has no data for. Experts that are not spread over ep are split over tp."""
    system, model = SYSTEMS.get(line["gpu"]), MODELS.get(line["model"]["name"])
    if system is None:
        return f"has no data for {line['gpu']}"
    if model is None:
        return f"has no {line['model']['name']}"
    if line["precision"] not in FORMATS:
        return f"format {line['precision']}"
    dense, experts = FORMATS[line["precision"]]
    ranks, ep = line["gpus"] // line["pp"], line["ep"]
    spread = bool(line["attention_dp"])
    routed = bool(line["model"]["experts"])
    return {
        "model": model,
        "system": system,
        "tp": 1 if spread else line["tp"],
        "pp": line["pp"],
        "attention_dp": ranks if spread else 1,
        "moe_tp": ranks // ep if routed else None,
        "moe_ep": ep if routed else None,
        "gemm": dense,
        "experts": experts if routed else None,
        "cache": CACHES[line.get("kv_precision") or ("fp8" if line["precision"] in ("fp8", "nvfp4") else "fp16")],
        "prompt": line["isl"],
        "output": line["osl"],
    }


def _ask(
    jobs: list[str], seconds: float, known: dict[str, float | str], store: Path, say: Callable[[str], None]
) -> None:
    """Ask job by job; `known` is filled, and saved every few answers."""
    python = python_of(ENVIRONMENT, f"aiconfigurator=={VERSION}")
    request = json.dumps({"seconds": seconds, "jobs": [json.loads(job) for job in jobs]})
    BUILD.mkdir(parents=True, exist_ok=True)
    question, complaints = BUILD / "aiconfigurator-request.json", BUILD / "aiconfigurator.log"
    replace_text(question, request)
    with (
        question.open("rb") as given,
        complaints.open("wb") as log,
        subprocess.Popen([str(python), str(PEER)], stdin=given, stdout=subprocess.PIPE, stderr=log) as process,
    ):
        for count, text in enumerate(process.stdout or (), 1):
            position, answer = json.loads(text)
            known[jobs[position]] = answer
            if count % SAVE_EVERY == 0:
                replace_text(store, json.dumps(known))
                say(f"aiconfigurator: {count} of {len(jobs)}")
    replace_text(store, json.dumps(known))
    if process.returncode:
        raise UnavailableError(f"ended with {process.returncode}; see {complaints.name} in build/accuracy")
