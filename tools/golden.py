"""`python -m tools.golden`: writes tests/cost/golden/estimates.json, what the cost model says of 40 configurations.

A change of any term or constant is seen in its diff. tests/cost/test_golden.py holds the model to it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.accuracy.store import replace_text

from meshwright import hardware, models
from meshwright.cost.evaluate import estimate
from meshwright.cost.serving import serve_estimate
from meshwright.cost.stack import stacks
from meshwright.cost.workload import ServingWorkload, Workload
from meshwright.layout.config import HybridParallelConfig, Precision, Recompute, Schedule

FILE = Path(__file__).resolve().parents[1] / "tests/cost/golden/estimates.json"

Sizes = dict[str, Any]
FULL, SELECTIVE = Recompute.FULL, Recompute.SELECTIVE
SP: Sizes = {"sequence_parallel": True}

TRAINING: list[tuple[str, str, int, int, Sizes]] = [
    # model, cluster, GPUs, sequence, configuration
    ("gpt2", "a100-80gb", 8, 1024, {"dp": 8, "global_batch": 64}),
    ("gpt3-1.3b", "v100", 32, 2048, {"dp": 8, "tp": 4, "global_batch": 128, "precision": Precision.FP16}),
    ("gpt3-175b", "a100-80gb", 1024, 2048, {"dp": 16, "tp": 8, "pp": 8, "global_batch": 1536, "recompute": FULL, **SP}),
    ("gpt3-175b", "a100-80gb", 1024, 2048, {"dp": 16, "tp": 8, "pp": 8, "vpp": 6, "global_batch": 1536, "zero": 1,
                                            "schedule": Schedule.INTERLEAVED, "recompute": SELECTIVE, **SP}),
    ("gpt3-175b", "a100-80gb", 384, 2048, {"dp": 384, "zero": 3, "micro_batch": 4, "global_batch": 1536,
                                           "recompute": FULL}),
    ("mt-nlg-530b", "a100-80gb", 2240, 2048, {"dp": 8, "tp": 8, "pp": 35, "global_batch": 1920, "recompute": FULL}),
    ("bloom-176b", "a100-80gb", 384, 2048, {"dp": 8, "tp": 4, "pp": 12, "micro_batch": 2, "global_batch": 2048,
                                            "zero": 1, "recompute": FULL}),
    ("llama-2-7b", "a100-80gb", 64, 4096, {"dp": 64, "zero": 3, "global_batch": 256, "micro_batch": 2}),
    ("llama-2-70b", "h100-sxm", 256, 4096, {"dp": 8, "tp": 4, "pp": 8, "global_batch": 512, "zero": 1, **SP}),
    ("llama-3.1-8b", "h100-sxm", 8, 8192, {"dp": 4, "tp": 2, "global_batch": 128, "zero": 1, **SP}),
    ("llama-3.1-8b", "h100-sxm", 64, 8192, {"dp": 64, "zero": 3, "global_batch": 128, "zero_shards": 8}),
    ("llama-3.1-8b", "h100-sxm", 64, 8192, {"dp": 64, "zero": 2, "global_batch": 256, "recompute": FULL}),
    ("llama-3.1-8b", "b200", 64, 8192, {"dp": 64, "zero": 1, "global_batch": 128, "precision": Precision.FP8}),
    ("llama-3.1-8b", "mi300x", 64, 8192, {"dp": 64, "zero": 3, "global_batch": 128}),
    ("llama-3.1-8b", "h100-efa", 32, 131072, {"dp": 1, "tp": 4, "cp": 8, "global_batch": 8, "zero": 1, **SP}),
    ("llama-3.1-70b", "h100-sxm", 64, 8192, {"dp": 2, "tp": 8, "pp": 4, "global_batch": 128, "zero": 1, **SP}),
    ("llama-3.1-70b", "h100-sxm", 64, 8192, {"dp": 2, "tp": 8, "pp": 4, "vpp": 5, "global_batch": 128, "zero": 1,
                                             "schedule": Schedule.INTERLEAVED, **SP}),
    ("llama-3.1-70b", "h100-sxm", 64, 8192, {"dp": 2, "tp": 8, "pp": 4, "global_batch": 128, "zero": 1,
                                             "schedule": Schedule.ZB_H1, **SP}),
    ("llama-3.1-70b", "h100-sxm", 64, 8192, {"dp": 2, "tp": 8, "pp": 4, "vpp": 2, "global_batch": 128, "zero": 1,
                                             "schedule": Schedule.ZBV, **SP}),
    ("llama-3.1-70b", "h100-sxm", 64, 8192, {"dp": 2, "tp": 8, "pp": 4, "global_batch": 64, "zero": 1,
                                             "schedule": Schedule.GPIPE, "recompute": FULL, **SP}),
    ("llama-3.1-70b", "h200-sxm", 512, 32768, {"dp": 8, "tp": 8, "pp": 4, "cp": 2, "global_batch": 256, "zero": 1,
                                               "precision": Precision.FP8, **SP}),
    ("llama-3.1-405b", "h100-sxm", 16384, 8192, {"dp": 128, "tp": 8, "pp": 16, "vpp": 8, "global_batch": 2048,
                                                 "zero": 1, "schedule": Schedule.INTERLEAVED, **SP}),
    ("llama-3.1-405b", "gb200", 576, 8192, {"dp": 9, "tp": 4, "pp": 16, "global_batch": 576, "zero": 1, **SP}),
    ("qwen3-32b", "h100-sxm", 128, 4096, {"dp": 16, "tp": 8, "global_batch": 512, "zero": 1, **SP}),
    ("gemma-3-27b", "h100-sxm", 64, 8192, {"dp": 8, "tp": 8, "global_batch": 128, "zero": 1, **SP}),
    ("mixtral-8x7b", "h100-sxm", 64, 4096, {"dp": 32, "pp": 2, "ep": 8, "global_batch": 256, "zero": 1}),
    ("mixtral-8x22b", "h100-sxm", 128, 4096, {"dp": 16, "tp": 2, "pp": 4, "ep": 8, "global_batch": 256, "zero": 1,
                                              **SP}),
    ("qwen3-30b-a3b", "h100-sxm", 16, 4096, {"dp": 16, "ep": 16, "global_batch": 256, "zero": 1}),
    ("qwen3-235b-a22b", "h100-sxm", 256, 4096, {"dp": 16, "tp": 2, "pp": 8, "ep": 32, "global_batch": 1024, "zero": 1,
                                                **SP}),
    ("deepseek-v3", "h800", 2048, 4096, {"dp": 128, "pp": 16, "ep": 64, "vpp": 2, "global_batch": 15360, "zero": 1,
                                         "schedule": Schedule.DUALPIPEV, "precision": Precision.FP8}),
    ("deepseek-v3", "h100-sxm", 1024, 4096, {"dp": 32, "tp": 2, "pp": 16, "ep": 64, "global_batch": 8192, "zero": 1,
                                             "recompute": FULL, **SP}),
    ("qwen3-next-80b-a3b", "h100-sxm", 64, 8192, {"dp": 64, "ep": 8, "global_batch": 256, "zero": 1}),
]  # fmt: skip

SERVING: list[tuple[str, str, int, int, int, int | None, Sizes]] = [
    # model, cluster, GPUs, prompt, output, sequences per replica (None: as many as fit), configuration
    ("llama-3.1-8b", "h100-sxm", 1, 1024, 256, None, {}),
    ("llama-3.1-8b", "a100-80gb", 1, 128, 8, 16, {}),
    ("llama-3.1-70b", "h100-sxm", 8, 1024, 1024, None, {"tp": 8}),
    ("llama-3.1-70b", "h200-sxm", 4, 500, 2000, None, {"tp": 4, "precision": Precision.FP8}),
    ("llama-3.1-405b", "h100-sxm", 16, 2048, 512, None, {"tp": 8, "pp": 2, "precision": Precision.FP8}),
    ("deepseek-v3", "h200-sxm", 16, 2048, 512, None, {"dp": 16, "ep": 16, "precision": Precision.FP8}),
    ("qwen3-235b-a22b", "b200", 8, 1000, 1000, None, {"dp": 8, "ep": 8, "precision": Precision.NVFP4}),
    ("mixtral-8x7b", "h100-sxm", 4, 512, 128, 1, {"tp": 4, "expert_tp": 4}),
]


@dataclass(frozen=True)
class Case:
    """A question and the model's answer."""

    name: str
    answer: dict[str, Any]


def cases() -> list[Case]:
    """Every case, priced now."""
    trained = [Case(_name(*case), training(*case)) for case in TRAINING]
    served = [Case(_served(*case), serving(*case)) for case in SERVING]
    return [*trained, *served]


def training(model: str, cluster: str, gpus: int, seq: int, sizes: Sizes) -> dict[str, Any]:
    """Seconds by part, bytes by kind on the fullest stage, bytes by axis on the first."""
    stack = stacks()["megatron-deepspeed"] if model == "bloom-176b" else None
    config = HybridParallelConfig(**sizes)
    found = estimate(models.load(model), hardware.load(cluster, gpus=gpus), Workload(seq=seq), config, stack)
    traffic: dict[str, int] = {}
    for entry in found.traffic[min(found.traffic)]:
        traffic[entry.axis] = traffic.get(entry.axis, 0) + entry.total_bytes
    return {
        "step_s": found.time.step_s,
        "parts_s": {part: seconds for part, seconds in found.time.parts_s.items() if seconds},
        "memory_bytes": {str(kind): nbytes for kind, nbytes in found.memory.peak.bytes_by_kind.items() if nbytes},
        "traffic_bytes": dict(sorted(traffic.items())),
        "tokens_per_s_per_gpu": found.throughput.tokens_per_s_per_gpu,
        "mfu": found.throughput.mfu,
    }


def serving(
    model: str, cluster: str, gpus: int, prompt: int, output: int, batch: int | None, sizes: Sizes
) -> dict[str, Any]:
    """What fits, how fast."""
    work = ServingWorkload(prompt, output)
    config = HybridParallelConfig(**sizes)
    found = serve_estimate(models.load(model), hardware.load(cluster, gpus=gpus), work, config, batch)
    names = ("weights_bytes", "workspace_bytes", "cache_bytes_per_sequence", "max_sequences", "sequences", "ttft_s",
             "tpot_s", "latency_s", "tokens_per_s_per_gpu")  # fmt: skip
    return {name: getattr(found, name) for name in names}


def _name(model: str, cluster: str, gpus: int, seq: int, sizes: Sizes) -> str:
    return f"{model} on {gpus} {cluster}, seq {seq}: {_words(sizes)}"


def _served(model: str, cluster: str, gpus: int, prompt: int, output: int, batch: int | None, sizes: Sizes) -> str:
    return f"{model} served on {gpus} {cluster}, {prompt} in, {output} out, batch {batch}: {_words(sizes)}"


def _words(sizes: Sizes) -> str:
    return " ".join(f"{name}={value}" for name, value in sizes.items()) or "one device"


def main() -> None:
    document = {case.name: case.answer for case in cases()}
    replace_text(FILE, json.dumps(document, indent=1) + "\n")
    print(f"wrote {len(document)} estimates to {FILE.relative_to(FILE.parents[3])}")


if __name__ == "__main__":
    main()
