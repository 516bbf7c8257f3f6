"""CPU seconds per rank and step of the runtime against one process of plain Hugging Face, measured in one run.

The work: 8-layer Llama, hidden 512, ffn 1376, 8 heads, sequence 512, vocabulary 8192, 8 sequences, fp32, AdamW, one
thread per rank. Layouts are interleaved round by round, the median over rounds counts. Writes build/bench-runtime.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from meshwright.layout.config import HybridParallelConfig, Precision
from meshwright.runtime.engine import EngineOptions, build_engine
from meshwright.runtime.families import family_of
from meshwright.runtime.launch import Device, run_ranks
from meshwright.runtime.optimizer import OptimizerOptions
from meshwright.runtime.process_groups import ProcessGroupManager
from meshwright.runtime.weights import SeededWeights, meta_model, reference_model

SEQ, SEQUENCES = 512, 8
LIMIT = 1.10
"""Of the ideal, which is the plain process's CPU seconds divided by the ranks."""

MODEL = LlamaConfig(
    num_hidden_layers=8,
    hidden_size=512,
    intermediate_size=1376,
    num_attention_heads=8,
    num_key_value_heads=8,
    vocab_size=8192,
    max_position_embeddings=SEQ,
    tie_word_embeddings=False,
)


def plan(**sizes: Any) -> HybridParallelConfig:
    defaults: dict[str, Any] = {"global_batch": SEQUENCES, "precision": Precision.FP32}
    return HybridParallelConfig(**(defaults | sizes))


LAYOUTS = {
    "tp2": plan(tp=2, micro_batch=SEQUENCES),
    "pp2": plan(pp=2, micro_batch=1, layer_split=(5, 3)),  # the head costs about 1.5 layers
    "dp2": plan(dp=2, micro_batch=SEQUENCES // 2),
}


@dataclass(frozen=True)
class Sample:
    """CPU and wall seconds per step of one rank."""

    cpu_s: float
    wall_s: float


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, MODEL.vocab_size, (SEQUENCES, SEQ + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def timed(step: Any, steps: int) -> Sample:
    step()  # allocates, and starts the backends' threads
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps):
        step()
    return Sample((time.process_time() - cpu) / steps, (time.perf_counter() - wall) / steps)


def run_plain(steps: int) -> Sample:
    """transformers' own training step, as its users write it."""
    model = reference_model(MODEL, 0, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    tokens, labels = batch()

    def step() -> None:
        logits = model(tokens, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, steps)


def run_layout(config: HybridParallelConfig, steps: int) -> Sample:
    groups = ProcessGroupManager(config, Device("cpu", "gloo"))
    options = EngineOptions(seq=SEQ, optimizer=OptimizerOptions())
    engine = build_engine(config, MODEL, groups, SeededWeights(MODEL, family_of(MODEL), 0), options)
    tokens, labels = batch()
    own = config.global_batch // config.dp
    rows = slice(groups.axis("dp").rank * own, (groups.axis("dp").rank + 1) * own)
    return timed(lambda: engine.step(tokens[rows], labels[rows]), steps)


def measure(rounds: int, steps: int, names: list[str]) -> dict[str, Any]:
    meta_model(MODEL)  # import the model's code before forking
    plain: list[Sample] = []
    by_layout: dict[str, list[list[Sample]]] = {name: [] for name in names}
    for _ in range(rounds):
        plain.append(run_ranks(1, run_plain, steps, timeout_s=3600)[0])
        for name, samples in by_layout.items():
            config = LAYOUTS[name]
            samples.append(run_ranks(config.world_size, run_layout, config, steps, timeout_s=3600))
    plain_s = statistics.median(s.cpu_s for s in plain)
    result: dict[str, Any] = {
        "plain": {"cpu_s": plain_s, "wall_s": statistics.median(s.wall_s for s in plain)},
        "rounds": rounds,
        "steps": steps,
        "layouts": {},
    }
    for name, samples in by_layout.items():
        ideal = plain_s / LAYOUTS[name].world_size
        slowest = statistics.median(max(s.cpu_s for s in ranks) for ranks in samples)
        mean = statistics.median(statistics.mean(s.cpu_s for s in ranks) for ranks in samples)
        result["layouts"][name] = {
            "cpu_s_mean": mean,
            "cpu_s_slowest_rank": slowest,
            "wall_s": statistics.median(max(s.wall_s for s in ranks) for ranks in samples),
            "mean_over_ideal": mean / ideal,
            "slowest_over_ideal": slowest / ideal,
            "within_limit": mean / ideal <= LIMIT,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--layouts", nargs="+", choices=sorted(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--out", type=Path, default=Path("build/bench-runtime.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(arguments.rounds, arguments.steps, arguments.layouts)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"one process of plain transformers: {result['plain']['cpu_s']:.2f} CPU s a step")
    for name, row in result["layouts"].items():
        print(
            f"{name}: {row['cpu_s_mean']:.2f} CPU s per rank and step, {row['mean_over_ideal']:.3f} x the ideal "
            f"(slowest rank {row['slowest_over_ideal']:.3f} x; limit {LIMIT:.2f})"
        )


if __name__ == "__main__":
    main()
