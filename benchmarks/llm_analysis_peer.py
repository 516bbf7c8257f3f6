"""Runs inside the environment of llm-analysis (PyPI), not of meshwright: how many training configurations it evaluates
in a CPU second, and what it says of one. Reads a JSON request on stdin, prints one JSON document.

Its log (a page per call) is switched off, so that only the arithmetic is timed.
"""

from __future__ import annotations

import json
import logging
import sys
import time

logging.disable(logging.CRITICAL)

from llm_analysis.analysis import ActivationRecomputation, DSZeRO, LLMAnalysis  # noqa: E402
from llm_analysis.config import GPUConfig, ModelConfig, ParallelismConfig  # noqa: E402


def estimate(model: ModelConfig, gpu: GPUConfig, request: dict, row: dict) -> dict:
    analysis = LLMAnalysis(
        model,
        gpu,
        parallelism_config=ParallelismConfig(
            tp_size=row["tp"], pp_size=row["pp"], dp_size=row["dp"], sp_size=row["tp"] if row["sp"] else 1
        ),
        flops_efficiency=request["flops_efficiency"],
    )
    return analysis.training(
        batch_size_per_gpu=row["micro_batch"],
        global_batch_size=request["global_batch"],
        seq_len=request["seq"],
        activation_recomputation=ActivationRecomputation[row["recompute"].upper()],
        ds_zero=DSZeRO(row["zero"]),
    )


def main() -> None:
    request = json.load(sys.stdin)
    model = ModelConfig(**request["model"])
    gpu = GPUConfig(**request["gpu"])
    rows = request["rows"]
    first = estimate(model, gpu, request, rows[0])
    done, refused = 0, 0
    start = time.process_time()
    while time.process_time() - start < request["seconds"]:
        for row in rows:
            try:
                estimate(model, gpu, request, row)
                done += 1
            except AssertionError:  # its own checks, for instance a batch that does not fit
                refused += 1
    seconds = time.process_time() - start
    json.dump(
        {
            "evaluated": done,
            "refused": refused,
            "seconds": seconds,
            "step_s": first["latency_per_iter"],
            "memory_bytes": first["(weight+op_state+grad+act)_memory_per_gpu"],
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
