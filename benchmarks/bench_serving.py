"""Output tokens/s of `meshwright generate` and of vLLM's CPU build beside plain transformers, in one run.

The work: 8-layer Llama, hidden 512, vocabulary 264, fp32, one batch of 8 prompts of 32 tokens, 48 new tokens each,
greedy, no end token. transformers runs with 1 and with 2 threads, each rank of a layout with one. A round asks all in
turn, the server that is not asked is stopped (SIGSTOP); the first answers of each process warm it up and do not count;
the median over rounds does. Writes build/bench-serving.json. vLLM: the environment of `make test-serving`. To be run
alone: threads that wait for one another spin.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tools.serving_env import HERE, python_of
from transformers import LlamaConfig

from meshwright.layout.config import HybridParallelConfig, Precision
from meshwright.plan import ModelSection, Plan, ServingWorkload
from meshwright.runtime.generation.generator import GenerationJob, GenerationRank
from meshwright.runtime.generation.text import write_byte_tokenizer
from meshwright.runtime.launch import Device, run_ranks
from meshwright.runtime.weights import meta_model, reference_model
from meshwright.serving import VllmOptions, vllm_launch
from meshwright.serving.client import Completion, complete
from meshwright.serving.server import CPU_COMPILATION, CPU_ENVIRONMENT, VllmServer, session_members

PROMPTS, PROMPT, NEW = 8, 32, 48
PORT, READY_S = 8421, 600.0
WORK = HERE / "build" / "bench-serving"
MODEL = LlamaConfig(
    num_hidden_layers=8,
    hidden_size=512,
    intermediate_size=1376,
    num_attention_heads=8,
    num_key_value_heads=8,
    vocab_size=264,  # bytes, as the tokenizer that vLLM is given
    initializer_range=0.1,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    eos_token_id=None,
    bos_token_id=None,
)
LAYOUTS: dict[str, dict[str, int]] = {"single": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "dp2": {"dp": 2}}
Tokens = list[list[int]]


def prompts() -> tuple[tuple[int, ...], ...]:
    draw = random.Random(1)
    return tuple(tuple(draw.randrange(MODEL.vocab_size) for _ in range(PROMPT)) for _ in range(PROMPTS))


def layout(name: str) -> HybridParallelConfig:
    sizes = LAYOUTS[name]
    return HybridParallelConfig(precision=Precision.FP32, global_batch=sizes.get("dp", 1), **sizes)


def run_plain(threads: int) -> tuple[float, Tokens]:
    """transformers' own generate on the whole batch: seconds of the second answer."""
    torch.set_num_threads(threads)
    model: Any = reference_model(MODEL, 0, torch.float32).eval()
    ids = torch.tensor(prompts())
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    seconds, answer = 0.0, ids
    for _ in range(2):
        started = time.perf_counter()
        with torch.inference_mode():
            answer = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **options)
        seconds = time.perf_counter() - started
    return seconds, answer[:, PROMPT:].tolist()


def run_generate(job: GenerationJob) -> tuple[float, dict[int, list[int]]]:
    """One rank of `meshwright generate`: seconds of its second answer."""
    torch.set_num_threads(1)
    rank = GenerationRank(job, Device("cpu", "gloo"))
    rank.answer()
    done = rank.answer()
    return done.seconds, done.tokens


def generated(name: str) -> tuple[float, Tokens]:
    job = GenerationJob(layout(name), MODEL, prompts(), NEW, show_progress=False)
    ranks = run_ranks(job.config.world_size, run_generate, job, timeout_s=600)
    answers = {number: tokens for _, found in ranks for number, tokens in found.items()}
    return max(seconds for seconds, _ in ranks), [answers[n] for n in range(PROMPTS)]


@contextmanager
def serving(name: str, model: Path) -> Iterator[VllmServer]:
    """vLLM at a layout, warm and stopped; `asked` continues it."""
    plan = Plan.from_parts(
        ModelSection(name=str(model), config=MODEL.to_dict()),
        layout(name),
        ServingWorkload(kind="serving", prompt=PROMPT, output=NEW, batch=PROMPTS),
    )
    options = VllmOptions(model=str(model), port=PORT, extra={"compilation_config": CPU_COMPILATION})
    executable = str(python_of().with_name("vllm"))
    environment = {**CPU_ENVIRONMENT, "HF_HUB_OFFLINE": "1"}
    with VllmServer(vllm_launch(plan, options).processes[0], executable, WORK / name, environment) as server:
        server.wait(READY_S, lambda _seconds, _line: None)
        asked(server, model)
        signal_session(server.pid, signal.SIGSTOP)
        try:
            yield server
        finally:
            signal_session(server.pid, signal.SIGCONT)


def signal_session(session: int, number: signal.Signals) -> None:
    for pid in session_members(session):
        os.kill(pid, number)


def asked(server: VllmServer, model: Path) -> tuple[float, Tokens]:
    """Seconds until all prompts, sent at once, are answered."""
    requests = [Completion(str(model), prompt, NEW) for prompt in prompts()]
    with ThreadPoolExecutor(PROMPTS) as pool:
        started = time.perf_counter()
        answers = list(pool.map(lambda request: list(complete(server.url, request)), requests))
        return time.perf_counter() - started, answers


def asked_stopped(server: VllmServer, model: Path) -> tuple[float, Tokens]:
    signal_session(server.pid, signal.SIGCONT)
    try:
        return asked(server, model)
    finally:
        signal_session(server.pid, signal.SIGSTOP)


def measure(names: list[str], rounds: int, with_vllm: bool) -> dict[str, Any]:
    model = WORK / "model"
    reference: Any = reference_model(MODEL, 0, torch.float32)
    reference.save_pretrained(model)
    write_byte_tokenizer(model)
    meta_model(MODEL)  # imports the model's code once, before ranks fork
    every: dict[str, list[float]] = {}
    equal: dict[str, bool] = {}
    truth = run_ranks(1, run_plain, 1, timeout_s=600)[0][1]

    def note(name: str, run: Callable[[], tuple[float, Tokens]]) -> None:
        seconds, tokens = run()
        every.setdefault(name, []).append(seconds)
        equal[name] = equal.get(name, True) and tokens == truth

    def plainly(threads: int) -> Callable[[], tuple[float, Tokens]]:
        return lambda: run_ranks(1, run_plain, threads, timeout_s=600)[0]

    def round_of(name: str, server: VllmServer | None) -> None:
        note("transformers, 1 thread", plainly(1))
        note("transformers, 2 threads", plainly(2))
        note(f"generate, {name}", lambda: generated(name))
        if server is not None:
            note(f"vLLM, {name}", lambda: asked_stopped(server, model))

    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        if not with_vllm:
            for _ in range(rounds):
                round_of(name, None)
            continue
        with serving(name, model) as server:
            for _ in range(rounds):
                round_of(name, server)
    rows = {
        name: {
            "tokens_per_s": PROMPTS * NEW / statistics.median(seconds),
            "tokens_equal": equal[name],
            "seconds": seconds,
        }
        for name, seconds in every.items()
    }
    return {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "rounds": rounds, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layouts", nargs="+", choices=sorted(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--no-vllm", action="store_true", help="transformers and generate only")
    parser.add_argument("--out", type=Path, default=HERE / "build" / "bench-serving.json")
    arguments = parser.parse_args()
    if not arguments.no_vllm and not python_of().is_file():
        raise SystemExit("vLLM's environment is not there: run make test-serving once, or give --no-vllm")
    WORK.mkdir(parents=True, exist_ok=True)
    result = measure(arguments.layouts, arguments.rounds, not arguments.no_vllm)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    plain = result["rows"]["transformers, 1 thread"]["tokens_per_s"]
    for name, row in result["rows"].items():
        same = "" if row["tokens_equal"] else "; TOKENS DIFFER from transformers"
        print(f"{name:24}{row['tokens_per_s']:8.1f} tokens/s, {row['tokens_per_s'] / plain:.2f} of one thread{same}")
    return 0 if all(row["tokens_equal"] for row in result["rows"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
