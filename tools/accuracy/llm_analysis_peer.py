"""Runs inside the environment of llm-analysis (PyPI), not of meshwright: predicted seconds of a step and bytes per GPU
for every job of a JSON list on stdin. Prints one JSON list: [seconds, bytes], or the words of its own refusal.
"""

from __future__ import annotations

import json
import logging
import sys

logging.disable(logging.CRITICAL)

from llm_analysis.analysis import ActivationRecomputation, DSZeRO, LLMAnalysis  # noqa: E402
from llm_analysis.config import DtypeConfig, GPUConfig, ModelConfig, ParallelismConfig  # noqa: E402

GIVEN = "weight+op_state+grad+act"


def predict(job: dict) -> list[float] | str:
    try:
        analysis = LLMAnalysis(
            ModelConfig(**job["model"]),
            GPUConfig(**job["gpu"]),
            DtypeConfig(name="job", weight_bits=job["bits"], activation_bits=job["bits"], embedding_bits=16),
            ParallelismConfig(**job["split"]),
            flops_efficiency=job["flops_efficiency"],
        )
        found = analysis.training(
            batch_size_per_gpu=job["micro_batch"],
            global_batch_size=job["global_batch"],
            seq_len=job["seq"],
            activation_recomputation=ActivationRecomputation[job["recompute"].upper()],
            ds_zero=DSZeRO(job["zero"]),
            flash_attn=job["flash"],
            mlp_gated_linear_units=job["gated"],
        )
    except Exception as error:  # whatever stops it is its answer
        return f"{type(error).__name__}: {str(error)[:120]}"
    return [found["latency_per_iter"], found[f"({GIVEN})_memory_per_gpu"]]


json.dump([predict(job) for job in json.load(sys.stdin)], sys.stdout)
