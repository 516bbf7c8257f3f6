"""Runs inside the environment of aiconfigurator (PyPI), not of meshwright: the best aggregated throughput of every job
of a JSON request on stdin, over batch sizes and context budgets as its own sweep tries them, without a latency target.

Prints one JSON line per job as it is done: [position, tokens/s per GPU] or [position, words of its refusal].
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
import warnings
from functools import lru_cache

warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)

from aiconfigurator.sdk.config import ModelConfig, RuntimeConfig  # noqa: E402
from aiconfigurator.sdk.config_builders import build_model_config  # noqa: E402
from aiconfigurator.sdk.models import (  # noqa: E402
    check_is_moe,
    resolve_context_fmha_by_data,
    resolve_nvfp4_for_system,
)
from aiconfigurator.sdk.perf_database import get_database_view, get_latest_database_version  # noqa: E402
from aiconfigurator.sdk.sweep import sweep_agg  # noqa: E402

BACKEND = "trtllm"
LARGEST_BATCH = 1024


@lru_cache
def database(system: str) -> object:
    version = get_latest_database_version(system=system, backend=BACKEND)
    return get_database_view(system, BACKEND, version, allow_missing_data=False, database_mode="SILICON")


def best(job: dict) -> float:
    split = [job["tp"], job["pp"], job["attention_dp"]]
    moe_tp, moe_ep = job["moe_tp"], job["moe_ep"]
    if check_is_moe(job["model"]):
        widths = ModelConfig(tp_size=job["tp"], attention_dp_size=split[2], moe_tp_size=moe_tp, moe_ep_size=moe_ep)
        moe_tp, moe_ep = widths.resolve_moe_parallelism()
    quantised = [job["gemm"], job["cache"], None, job["experts"], None]
    settings = build_model_config(*split, moe_tp, moe_ep, *quantised)
    resolve_context_fmha_by_data(settings, job["model"], database(job["system"]), BACKEND, is_context_role=True)
    resolve_nvfp4_for_system(settings, job["system"], job["model"], backend_name=BACKEND)
    found = sweep_agg(
        model_path=job["model"],
        runtime_config=RuntimeConfig(isl=job["prompt"], osl=job["output"], ttft=math.inf, tpot=math.inf),
        database=database(job["system"]),
        backend_name=BACKEND,
        model_config=settings,
        parallel_config_list=[(*split, moe_tp or 1, moe_ep or 1, 1)],
        top_k=1,
        max_batch_size=LARGEST_BATCH,
    )
    return float(found["tokens/s/gpu"].max())


def main() -> None:
    request = json.load(sys.stdin)
    stop = time.monotonic() + request["seconds"]
    for position, job in enumerate(request["jobs"]):
        if time.monotonic() > stop:
            break
        try:
            answer: float | str = best(job)
        except Exception as error:  # whatever stops it is its answer
            answer = f"{type(error).__name__}: {' '.join(str(error).split())[:140]}"
        print(json.dumps([position, answer]), flush=True)


if __name__ == "__main__":
    main()
