"""`make doctor-check`: runs with one planted fault each, and what `doctor efficiency` ranks first.

A straggler (one rank sleeps in every forward pass), an unbalanced stage, too few microbatches, a router that sends most
tokens to one rank's experts, a slow link between two network namespaces (tc tbf; skipped where there are none). Exit
code 1 where another fault comes first. Runs are in build/doctor-check.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tools.namespaces import on_two_machines
from tools.two_machines import reason_to_skip
from torch import Tensor

from meshwright.doctor.efficiency import EfficiencyReport, diagnose_efficiency
from meshwright.doctor.run_records import read_run
from meshwright.plan import Plan
from meshwright.runtime.expert_parallel import ExpertParallelMoE
from meshwright.runtime.model_config import transformers_config
from meshwright.runtime.stage import StageModule
from meshwright.runtime.tokens import prepare
from meshwright.runtime.trainer import TrainingJob, train_forked

FOLDER = Path("build/doctor-check")
DATA = Path("docs")
STEPS = 14
SLEEP_S = 0.6
CABLE = "100mbit"
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 192, "intermediate_size": 512,
    "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 32, "vocab_size": 264,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


EXPERTS = MODEL | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
}  # fmt: skip
SKEWED = 0.8
"""Share of the tokens that the planted router sends to the experts of the first ep rank."""


def plan_of(model: dict[str, Any] = MODEL, **parallel: Any) -> Plan:
    return Plan.model_validate(
        {
            "model": {"name": "toy", "config": model},
            "cluster": {"name": "cpu", "nodes": parallel.pop("nodes", 1), "gpus_per_node": parallel.pop("per_node", 8)},
            "workload": {"seq": 64},
            "parallel": {"precision": "fp32", "global_batch": 16} | parallel,
            "training": {"steps": STEPS},
        }
    )


@contextmanager
def sleeping(rank: int) -> Iterator[None]:
    """One rank sleeps in every forward pass."""
    whole = StageModule.forward

    def slow(self: StageModule, *inputs: Any) -> Any:
        if dist.get_rank() == rank:
            time.sleep(SLEEP_S)
        return whole(self, *inputs)

    StageModule.forward = slow
    try:
        yield
    finally:
        StageModule.forward = whole


@contextmanager
def skewed() -> Iterator[None]:
    """Most tokens go to the experts of the first ep rank, whatever the router says."""
    whole = ExpertParallelMoE.forward

    def deal(self: ExpertParallelMoE, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        moved = index.clone()
        few = int(SKEWED * len(index))
        moved[:few] = index[:few] % (self.experts // self.region.axes.ep.size)
        return whole(self, hidden, moved, weights)

    ExpertParallelMoE.forward = deal
    try:
        yield
    finally:
        ExpertParallelMoE.forward = whole


def forked(name: str, plan: Plan) -> EfficiencyReport:
    folder = FOLDER / name
    tokens = prepare(DATA, "bytes", FOLDER / "tokens")
    train_forked(TrainingJob(plan, transformers_config(plan), tokens, folder, show_progress=False))
    return diagnose_efficiency(read_run(folder))


def straggler() -> EfficiencyReport:
    with sleeping(rank=2):
        return forked("straggler", plan_of(dp=4, micro_batch=2, per_node=4))


def imbalance() -> EfficiencyReport:
    return forked("imbalance", plan_of(pp=2, micro_batch=1, layer_split=[7, 1], per_node=2))


def bubble() -> EfficiencyReport:
    return forked("bubble", plan_of(pp=2, micro_batch=16, per_node=2))


def experts() -> EfficiencyReport:
    with skewed():
        return forked("experts", plan_of(EXPERTS, dp=4, ep=4, micro_batch=4, global_batch=64, per_node=4))


def slow_link() -> EfficiencyReport:
    folder, file = FOLDER / "slow-link", FOLDER / "slow-link.yaml"
    plan_of(dp=2, micro_batch=8, nodes=2, per_node=1).write(file)
    arguments = ["train", str(file), "--data", str(DATA), "--out", str(folder), "--json"]
    on_two_machines(arguments, 1, CABLE, FOLDER / "slow-link-logs", limit_s=600.0)
    return diagnose_efficiency(read_run(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one of the planted faults: experts")
    only = parser.parse_args().only
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    cases = {"straggler": straggler, "imbalance": imbalance, "bubble": bubble, "experts": experts}
    reason = reason_to_skip()
    if reason is None:
        cases["slow link"] = slow_link
    else:
        print(f"slow link: skipped, {reason}")
    if only is not None:
        cases = {only: cases[only]}
    wrong = 0
    for planted, run in cases.items():
        report = run()
        first = report.faults[0] if report.faults else None
        found = "nothing" if first is None else first.kind
        wrong += found != planted
        share = 0.0 if first is None else first.loss_s / report.parts.step_s
        print(f"planted: {planted}; first: {found} ({share:.0%} of a step of {report.parts.step_s:.3g} s)", flush=True)
        print("  " + ("" if first is None else first.words), flush=True)
        for change in report.changes[:1]:
            print(f"  pays most: saves {change.saved_s:.3g} s a step: {change.words}", flush=True)
    if wrong:
        sys.exit(f"doctor-check: {wrong} of {len(cases)} runs had another fault ranked first")


if __name__ == "__main__":
    main()
