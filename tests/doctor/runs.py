"""Runs made up for the doctor: every rank's steps as a fault would leave them, in memory or as a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from meshwright.doctor.run_records import RankRun, RankStep, RouterStep, Run
from meshwright.layout.grid import rank_layout
from meshwright.ledger import Collective, Phase, TrafficEntry
from meshwright.plan import Plan

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 704,
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 264,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip

EXPERTS = MODEL | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip

Wait = Callable[[str, int], float]


def plan(model: dict[str, object] = MODEL, **parallel: object) -> Plan:
    values = {"precision": "fp32"} | parallel
    return Plan.model_validate(
        {"model": {"name": "toy", "config": model}, "workload": {"seq": 64}, "parallel": values, "cluster": "cpu"}
    )


def run(
    document: Plan,
    compute: Callable[[int], float],
    transfer: Callable[[str, int], float],
    *,
    steps: int = 30,
    noise: float = 0.03,
    hosts: Callable[[int], str] = lambda rank: "a",
    traffic: dict[int, tuple[TrafficEntry, ...]] | None = None,
    bubble: float = 0.0,
    router: tuple[RouterStep, ...] = (),
) -> Run:
    """Steps in which every rank computes `compute(rank)` seconds and moves bytes for `transfer(axis, rank)`, and waits
    on the last axis for whoever is slower (pipelines: with `bubble` more)."""
    config = document.parallel
    layout = rank_layout(config)
    axes = [axis for axis in ("tp", "dp", "pp") if getattr(config, axis) > 1]
    drawn = np.random.default_rng(5)
    rows: list[list[RankStep]] = [[] for _ in range(config.world_size)]
    for step in range(1, steps + 1):
        own = np.array([compute(r) for r in range(config.world_size)])
        own = own * (1 + noise * np.abs(drawn.standard_normal(config.world_size)))
        moved = {axis: np.array([transfer(axis, r) for r in range(config.world_size)]) for axis in axes}
        busy = own + sum(moved.values())
        late = busy.max() - busy
        for r in range(config.world_size):
            waited = {axis: float(moved[axis][r]) for axis in axes}
            waited[axes[-1]] += float(late[r]) + (bubble if axes[-1] == "pp" else 0.0)
            rows[r].append(RankStep(step, float(own[r]) + sum(waited.values()), float(own[r]), float(own[r]), waited))
    places = layout.coordinates(np.arange(config.world_size))
    ranks = tuple(
        RankRun(r, hosts(r), {a: int(v[r]) for a, v in places.items()}, tuple(rows[r]), None, None)
        for r in range(config.world_size)
    )
    return Run(Path("made-up"), document, ranks, {}, None, traffic or {}, None, router=router)


def entry(axis: str, size: int, calls: int, total: int) -> TrafficEntry:
    return TrafficEntry(axis, Collective.ALL_REDUCE, Phase.BACKWARD, "gradients", size, calls, total)


def folder(where: Path, document: Plan, ranks: int = 2, steps: int = 8) -> Path:
    """A run's folder as the trainer leaves it."""
    (where / "ranks").mkdir(parents=True)
    lines = [{"kind": "run", "plan": document.to_dict()}]
    lines += [{"kind": "step", "step": n, "step_s": 0.1, "tokens": 64} for n in range(1, steps + 1)]
    (where / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for rank in range(ranks):
        place = {"rank": rank, "host": "a", "coordinates": {"dp": rank, "pp": 0, "cp": 0, "tp": 0}}
        own = [{"kind": "rank", **place}]
        own += [
            {"kind": "step", "step": n, "step_s": 0.1, "compute_s": 0.08, "cpu_s": 0.08, "waited_s": {"dp": 0.02}}
            for n in range(1, steps + 1)
        ]
        stem = where / "ranks" / f"rank-{rank:05d}"
        stem.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))
        memory = {**place, "device": "cpu", "allocated_bytes": 2**29, "peak_bytes": 2**30, "before_bytes": 2**28}
        Path(f"{stem}.memory.json").write_text(json.dumps(memory | {"by_kind": {"parameters": 2**20}}))
    return where
