"""`make bench-planner`: how fast configurations are evaluated and searched, on one core, and llm-analysis beside it.

Prints a table and writes build/bench-planner.json. Figures: configurations per second over at least a million rows, of
`screen` as a search calls it and of `evaluate` in full; seconds from question to ranked answer and peak memory of four
searches, each in a process of its own; seconds per row as the space grows; the command line with its start-up;
llm-analysis (PyPI) on the same estimate. Rates are per CPU second of one core, what the clock on the wall shows on an
idle machine; searches give both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from meshwright import hardware, models
from meshwright.cost.evaluate import CHUNK_ROWS, estimate, evaluate, screen
from meshwright.cost.stack import default_stack
from meshwright.cost.workload import Workload
from meshwright.layout.config import HybridParallelConfig, Recompute
from meshwright.planner.enumerate import space
from meshwright.planner.explore import explore

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
PEER_VERSION = "0.2.2"
PEER_SECONDS = 5.0

SEARCHES = {
    "GPT-3 175B on 1,024 A100": ("gpt3-175b", "a100-80gb", 1024, 2048, 1536),
    "GPT-3 175B on 4,096 A100": ("gpt3-175b", "a100-80gb", 4096, 2048, 1536),
    "Llama 3.1 405B on 16,384 H100": ("llama-3.1-405b", "h100-sxm", 16384, 8192, 2048),
    "DeepSeek-V3 on 2,048 H800": ("deepseek-v3", "h800", 2048, 4096, 15360),
}

SEARCH_CODE = """
import json, resource, sys, time
from meshwright import hardware, models
from meshwright.cost.workload import Workload
from meshwright.planner.search import search
name, cluster, gpus, seq, batch = json.loads(sys.argv[1])
start, cpu = time.perf_counter(), time.process_time()
result = search(models.load(name), hardware.load(cluster, gpus=gpus), Workload(seq=seq), batch)
seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
counts = result.counts
print(json.dumps({
    "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak,
    "enumerated": counts.enumerated, "evaluated": counts.evaluated,
    "feasible": counts.feasible, "mfu": result.best[0].throughput.mfu if result.best else None,
}))
"""


def one_core() -> None:
    """Keep this process and its children on one core, where the system lets us."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def best_of(repeats: int, body: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Least seconds of several runs: the others were disturbed."""
    seconds: list[float] = []
    for _ in range(repeats):
        start = clock()
        body()
        seconds.append(clock() - start)
    return min(seconds)


def evaluation_rate(rows_wanted: int) -> dict[str, float]:
    """Configurations per second of evaluate over `rows_wanted` rows of real search spaces; enumeration not counted.
    Once with pruning, as a search does it, and once with memory and time of every row."""
    found: dict[str, float] = {}
    for prune in (True, False):
        done, seconds = 0, 0.0
        while done < rows_wanted:
            for name, cluster_name, gpus, seq, batch in list(SEARCHES.values())[:3]:
                model, cluster = models.load(name), hardware.load(cluster_name, gpus=gpus)
                for _, chunk in space(model, cluster, seq, gpus, batch).chunks(CHUNK_ROWS):
                    start = time.process_time()
                    if prune:
                        screen(model, cluster, Workload(seq=seq), chunk)
                    else:
                        evaluate(model, cluster, Workload(seq=seq), chunk)
                    seconds += time.process_time() - start
                    done += len(chunk)
                if done >= rows_wanted:
                    break
        found["pruned" if prune else "all"] = done / seconds
        found["rows"] = done
    return found


def growth() -> list[tuple[int, float]]:
    """(configurations, seconds) of exploring ever larger spaces of one job: the batch gets more divisors."""
    model, cluster = models.load("gpt3-175b"), hardware.load("a100-80gb", gpus=4096)
    points: list[tuple[int, float]] = []
    for batch in (512, 1024, 1536, 3072, 6144, 12288, 24576):
        configurations = space(model, cluster, 2048, 4096, batch)
        seconds = best_of(2, lambda c=configurations: explore(model, cluster, Workload(seq=2048), c, default_stack()))
        points.append((len(configurations), seconds))
    return points


def searches() -> dict[str, dict[str, float]]:
    """Every search in its own process: seconds of the search, of the whole process, and peak memory."""
    found: dict[str, dict[str, float]] = {}
    for title, question in SEARCHES.items():
        start = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-c", SEARCH_CODE, json.dumps(question)], capture_output=True, text=True, check=True
        )
        found[title] = {**json.loads(run.stdout), "process_seconds": time.perf_counter() - start}
    return found


def command_line() -> tuple[float, float]:
    """Seconds of `meshwright plan` from the shell, start-up included: on the wall's clock, and of CPU."""
    words = "plan gpt3-175b --cluster a100-80gb --gpus 1024 --seq 2048 --global-batch 1536 --json"

    def run() -> None:
        subprocess.run([sys.executable, "-m", "meshwright", *words.split()], capture_output=True, check=True)

    wall = best_of(3, run, time.perf_counter)
    return wall, best_of(3, run, lambda: sum(os.times()[2:4]))


def peer() -> dict[str, float]:
    """llm-analysis in its own environment under build/, asked for GPT-3 175B on 1,024 A100 (tp 8, pp 8, dp 16) and for
    a list of its neighbours, one after the other: it has no search of its own."""
    environment = BUILD / "llm-analysis"
    python = environment / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", f"llm-analysis=={PEER_VERSION}"]
        subprocess.run(install, check=True)
    chip = hardware.load("a100-80gb").accelerator
    cluster = hardware.load("a100-80gb")
    shapes = [(8, 8, 16), (8, 4, 32), (4, 8, 32), (8, 16, 8), (4, 16, 16)]
    request = {
        "model": {"name": "gpt3-175b", "num_layers": 96, "n_head": 96, "hidden_dim": 12288, "vocab_size": 50257,
                  "max_seq_len": 2048},
        "gpu": {"name": "a100-80gb", "mem_per_GPU_in_GB": 80,
                "hbm_bandwidth_in_GB_per_sec": chip.memory_bandwidth / 1e9,
                "intra_node_bandwidth_in_GB_per_sec": cluster.intra.bandwidth / 1e9,
                "intra_node_min_message_latency": 8e-6, "peak_fp16_TFLOPS": chip.peak_flops["bf16"] / 1e12,
                "inter_node_bandwidth_in_GB_per_sec": cluster.inter.bandwidth / 1e9},
        "flops_efficiency": 0.5,
        "seq": 2048,
        "global_batch": 1536,
        "seconds": PEER_SECONDS,
        "rows": [
            {"tp": tp, "pp": pp, "dp": dp, "micro_batch": 1, "recompute": "full", "zero": 1, "sp": True}
            for tp, pp, dp in shapes
        ],
    }  # fmt: skip
    script = Path(__file__).with_name("llm_analysis_peer.py")
    run = subprocess.run(
        [str(python), str(script)], input=json.dumps(request), capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout)


def same_estimate() -> tuple[float, int]:
    """meshwright's step time and allocated memory of the configuration that the peer is asked for."""
    config = HybridParallelConfig(
        dp=16, tp=8, pp=8, sequence_parallel=True, global_batch=1536, zero=1, recompute=Recompute.FULL
    )
    result = estimate(models.load("gpt3-175b"), hardware.load("a100-80gb", gpus=1024), Workload(seq=2048), config)
    return result.time.step_s, result.memory.peak.total_bytes


def report(document: dict, say: Callable[[str], object] = print) -> None:
    rate = document["evaluate_per_s"]
    say(f"evaluate, one core, {rate['rows']:,} configurations")
    say(f"  as a search does it (time of those that fit)   {rate['pruned']:>12,.0f} configurations per CPU second")
    say(f"  memory and time of every one                   {rate['all']:>12,.0f} configurations per CPU second")
    say("searches, one core, from the question to the ranked answer")
    for title, row in document["searches"].items():
        say(
            f"  {title:<32}{row['enumerated']:>12,} configurations {row['seconds']:>7.2f} s"
            f" ({row['cpu_seconds']:.2f} s CPU; {row['process_seconds']:.2f} s with start-up),"
            f" peak {row['peak_bytes'] / 2**20:,.0f} MiB"
        )
    say("growth")
    for count, seconds in document["growth"]:
        say(f"  {count:>12,} configurations {seconds:>7.2f} s {seconds / count * 1e6:>7.2f} us each")
    say(f"command line with start-up: {document['command_line_s']:.2f} s ({document['command_line_cpu_s']:.2f} s CPU)")
    other = document["llm_analysis"]
    say(
        f"llm-analysis {PEER_VERSION}: {other['per_s']:,.0f} configurations per CPU second;"
        f" meshwright is {other['ratio']:,.0f}x"
    )
    say(
        f"  GPT-3 175B, 1,024 A100, tp 8 pp 8 dp 16: step {other['step_s']:.1f} s,"
        f" {other['memory_bytes'] / 2**30:.0f} GiB (llm-analysis at its 50 % efficiency)"
        f" against {other['our_step_s']:.1f} s,"
        f" {other['our_memory_bytes'] / 2**30:.0f} GiB (meshwright)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="configurations to evaluate")
    options = parser.parse_args()
    one_core()
    rate = evaluation_rate(options.rows)
    other = peer()
    per_s = other["evaluated"] / other["seconds"]
    step_s, memory_bytes = same_estimate()
    wall_s, cpu_s = command_line()
    document = {
        "evaluate_per_s": rate,
        "searches": searches(),
        "growth": growth(),
        "command_line_s": wall_s,
        "command_line_cpu_s": cpu_s,
        "llm_analysis": {
            **other,
            "per_s": per_s,
            "ratio": rate["pruned"] / per_s,
            "our_step_s": step_s,
            "our_memory_bytes": memory_bytes,
        },
    }
    BUILD.mkdir(exist_ok=True)
    (BUILD / "bench-planner.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    report(document)


if __name__ == "__main__":
    main()
