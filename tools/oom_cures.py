"""`make oom-cures`: five plans that do not fit, the first cure of `doctor oom` for each, and whether its plan fits.

Fits is what the dry run says: live bytes of the runtime's own program at their peak, on one rank of every role, and
what the driver holds, within the device. The plan before the cure must not fit in the same way. Exit code 1 where one
fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from meshwright.doctor.cures import Cure
from meshwright.doctor.oom import OomReport, diagnose_plan
from meshwright.dryrun.job import DryJob
from meshwright.dryrun.proof import trace_ranks
from meshwright.dryrun.roles import distinct_ranks
from meshwright.plan import Plan, TrainingWorkload
from meshwright.report.numbers import size
from meshwright.runtime.model_config import transformers_config

FOLDER = Path("build/oom-cures")
PLANS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B, replicas, eight sequences a microbatch": {
        "model": "llama-3.2-1b", "cluster": "a100-40gb", "seq": 8192,
        "parallel": {"dp": 8, "micro_batch": 8, "global_batch": 64},
    },
    "Qwen3-0.6B, replicas on 16 GB": {
        "model": "qwen3-0.6b", "cluster": "v100-16gb", "seq": 2048,
        "parallel": {"dp": 8, "micro_batch": 4, "global_batch": 32, "precision": "fp16"},
    },
    "Gemma 3 1B, a vocabulary of 262,144 on 24 GB": {
        "model": "gemma-3-1b", "cluster": {"name": "a10", "nodes": 2}, "seq": 4096,
        "parallel": {"dp": 4, "tp": 2, "micro_batch": 4, "global_batch": 16},
    },
    "Llama-3.1-8B, two stages without ZeRO": {
        "model": "llama-3.1-8b", "cluster": "a100-40gb", "seq": 8192,
        "parallel": {"dp": 2, "tp": 2, "pp": 2, "micro_batch": 1, "global_batch": 8},
    },
    "DeepSeek-V2-Lite, experts on every rank": {
        "model": "deepseek-v2-lite", "cluster": {"name": "h100-sxm", "nodes": 2}, "seq": 4096,
        "parallel": {"dp": 16, "ep": 1, "micro_batch": 2, "global_batch": 32},
    },
}  # fmt: skip
"""Each is priced as this project's runtime runs it: fp32 gradients and masters."""


@dataclass(frozen=True)
class Result:
    """Bytes of the fullest rank. `traced`: peak of live tensors and what the driver holds."""

    name: str
    capacity_bytes: int
    predicted_bytes: int
    traced_bytes: int
    cure: str
    saved_bytes: int
    slower: float
    cured_predicted_bytes: int
    cured_traced_bytes: int
    seconds: float

    @property
    def shown(self) -> bool:
        return self.cured_traced_bytes <= self.capacity_bytes < self.traced_bytes


def plan_of(case: dict[str, Any]) -> Plan:
    workload = {"seq": case["seq"], "stack": "meshwright", "gradient_bytes": 4}
    values = {"model": case["model"], "cluster": case["cluster"], "workload": workload, "parallel": case["parallel"]}
    return Plan.model_validate(values)


def traced_peak(plan: Plan, reserved_bytes: int) -> int:
    """Of the fullest of one rank per role."""
    assert isinstance(plan.workload, TrainingWorkload)
    job = DryJob(plan.parallel, transformers_config(plan), plan.workload.seq)
    traces = trace_ranks(job, distinct_ranks(plan.load_model(), plan.parallel))
    return max(trace.memory.peak.total_bytes for trace in traces) + reserved_bytes


def tried(name: str, case: dict[str, Any]) -> tuple[Result, OomReport, Cure]:
    started = time.perf_counter()
    report = diagnose_plan(plan_of(case))
    if report.fits or not report.cures or not report.cures[0].fits:
        sys.exit(f"{name}: fits already, or has no cure: choose another plan")
    first, reserved = report.cures[0], report.question.cluster.reserved_bytes
    before, after = (traced_peak(plan, reserved) for plan in (report.plan, report.plan_of(first)))
    result = Result(
        name,
        report.question.capacity_bytes,
        report.predicted.memory.peak.total_bytes,
        before,
        ", ".join(first.changes),
        first.saved_bytes,
        first.slower,
        first.peak_bytes,
        after,
        time.perf_counter() - started,
    )
    return result, report, first


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, help="number of one plan, from 1")
    only = parser.parse_args().only
    FOLDER.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for number, (name, case) in enumerate(PLANS.items(), start=1):
        if only not in (None, number):
            continue
        result, report, first = tried(name, case)
        results.append(result)
        report.plan_of(first).write(FOLDER / f"cured-{number}.yaml")
        print(f"{name}: {size(result.capacity_bytes)} a device ({result.seconds:.0f} s)")
        print(f"  before  predicted {size(result.predicted_bytes)}, dry run {size(result.traced_bytes)}")
        cost = f"{result.slower:.2f} times the step, saves {size(result.saved_bytes)}"
        print(f"  cure    {result.cure} ({cost})")
        print(
            f"  after   predicted {size(result.cured_predicted_bytes)}, dry run {size(result.cured_traced_bytes)}: ",
            end="",
        )
        print("fits" if result.shown else "NOT SHOWN", flush=True)
    (FOLDER / "result.json").write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n", encoding="utf-8")
    shown = sum(r.shown for r in results)
    print(f"{shown} of {len(results)} plans do not fit and fit with the first cure, by the dry run")
    return 0 if shown == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
