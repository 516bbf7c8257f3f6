"""What a live step sends equals what the cost model predicts: every line, calls and bytes, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from meshwright.cost.traffic import RankPlace, rank_ledger
from meshwright.cost.workload import Workload
from meshwright.layout.config import HybridParallelConfig, Precision, Recompute, Schedule
from meshwright.ledger import TrafficEntry
from meshwright.models import ModelSpec
from meshwright.runtime.engine import EngineOptions, build_engine
from meshwright.runtime.expert_parallel import Routing
from meshwright.runtime.families import family_of
from meshwright.runtime.launch import Device, run_ranks
from meshwright.runtime.process_groups import ProcessGroupManager
from meshwright.runtime.weights import SeededWeights

from .layouts import ALL_TO_ALL, DUALPIPEV, INTERLEAVED, SEQ, ZB_H1, ZBV, layout
from .tiny import tiny

FP32 = {"precision": Precision.FP32}
BF16 = {"precision": Precision.BF16}
CASES: list[tuple[str, dict[str, Any], HybridParallelConfig]] = [
    (
        "llama",
        {"tie_word_embeddings": True},
        layout(dp=2, pp=2, tp=2, sequence_parallel=True, zero=1, **FP32),
    ),
    ("llama", {}, layout(dp=2, pp=2, **INTERLEAVED, **FP32)),
    ("qwen3", {}, layout(tp=4, recompute=Recompute.FULL, recompute_every=2, **FP32)),
    ("gemma3_text", {}, layout(tp=2, sequence_parallel=True, recompute=Recompute.FULL, **FP32)),
    ("gpt2", {}, layout(tp=2, pp=2, sequence_parallel=True, **FP32)),
    ("llama", {}, layout(dp=2, pp=2, zero=2, **ZBV, **FP32)),
    ("llama", {}, layout(pp=2, schedule=Schedule.GPIPE, **FP32)),
    ("llama", {}, layout(pp=2, **ZB_H1, **FP32)),
    ("llama", {}, layout(pp=2, **DUALPIPEV, **FP32)),
    ("llama", {}, layout(cp=4, **FP32)),
    ("mistral", {}, layout(cp=2, dp=2, zero=3, recompute=Recompute.SELECTIVE, **FP32)),
    ("llama", {}, layout(dp=2, zero=3, **FP32)),
    ("phi3", {}, layout(dp=4, zero=2, zero_shards=2, **FP32)),
    ("phi3", {}, layout(tp=4, sequence_parallel=True, **FP32)),
    ("llama", {"vocab": 101, "tie_word_embeddings": True}, layout(tp=2, dp=3, zero=2, sequence_parallel=True, **FP32)),
    ("qwen3", {"vocab": 99, "mlp": 52}, layout(tp=4, dp=2, zero=3, **FP32)),
    ("gpt2", {"vocab": 97, "tie_word_embeddings": True}, layout(pp=3, dp=2, zero=1, layer_split=(1, 2, 1), **FP32)),
    ("gemma3_text", {}, layout(cp=4, **FP32)),
    ("gpt_neox", {}, layout(cp=2, tp=2, **FP32)),
    ("gpt_neox", {}, layout(cp=2, **ALL_TO_ALL, **FP32)),
    ("mistral", {}, layout(cp=2, dp=2, zero=3, recompute=Recompute.SELECTIVE, **ALL_TO_ALL, **FP32)),
    ("qwen3", {}, layout(cp=2, pp=2, recompute=Recompute.FULL, recompute_every=2, **ALL_TO_ALL, **FP32)),
    ("llama", {"heads": 8, "kv_heads": 4}, layout(cp=4, tp=2, sequence_parallel=True, **ALL_TO_ALL, **FP32)),
    ("mistral", {}, layout(dp=2, tp=2, sequence_parallel=True, **FP32)),
    ("llama", {"vocab": 99, "tie_word_embeddings": True}, layout(pp=4, tp=2, **FP32)),
    ("llama", {}, layout(dp=2, zero=1, global_batch=2, **BF16)),  # one microbatch
    ("llama", {}, layout(dp=2, pp=2, zero=3, **ZBV, **BF16)),
    ("qwen3", {}, layout(cp=2, tp=2, recompute=Recompute.SELECTIVE, **BF16)),
]


EXPERTS: list[tuple[str, HybridParallelConfig]] = [
    ("mixtral", layout(dp=2, tp=2, ep=2, sequence_parallel=True, zero=3, **FP32)),
    ("mixtral", layout(dp=2, tp=2, ep=2, expert_tp=2, **FP32)),
    ("mixtral", layout(dp=4, tp=2, ep=4, zero=2, zero_shards=2, **FP32)),
    ("qwen2_moe", layout(dp=2, tp=2, ep=2, sequence_parallel=True, zero=1, recompute=Recompute.FULL, **FP32)),
    ("deepseek_v3", layout(tp=2, pp=2, ep=2, recompute=Recompute.FULL, **FP32)),
    ("deepseek_v3", layout(cp=2, ep=2, **ALL_TO_ALL, **FP32)),
    ("gpt_oss", layout(dp=2, pp=2, ep=2, zero=2, **ZBV, **FP32)),
]


BALANCING = {"output_router_logits": True}
LOSSES: list[tuple[str, HybridParallelConfig]] = [
    ("mixtral", layout(dp=2, pp=2, tp=2, ep=2, sequence_parallel=True, **FP32)),
    ("qwen3_moe", layout(cp=2, pp=2, ep=2, **ZBV, **FP32)),
    ("deepseek_v3", layout(pp=2, ep=1, **FP32)),  # its class adds no such loss
]


def record_a_step(
    model: Any, config: HybridParallelConfig, **options: Any
) -> tuple[int, RankPlace, tuple[TrafficEntry, ...]]:
    groups = ProcessGroupManager(config, Device("cpu", "gloo"))
    source = SeededWeights(model, family_of(model), 0)
    engine = build_engine(config, model, groups, source, EngineOptions(seq=SEQ, **options))
    torch.manual_seed(groups.axis("dp").rank)
    tokens = torch.randint(0, 90, (config.global_batch // config.dp, SEQ))
    engine.step(tokens, tokens)
    groups.recorder.reset()
    engine.step(tokens, tokens)
    place = RankPlace(groups.axis("tp").rank, groups.axis("zero_shard").rank)
    return groups.axis("pp").rank, place, groups.recorder.traffic()


def predicted(model: Any, config: HybridParallelConfig, stage: int, place: RankPlace) -> tuple[TrafficEntry, ...]:
    return rank_ledger(ModelSpec.from_config(model.to_dict()), Workload(seq=SEQ), config, stage, place)


def lines(entries: tuple[TrafficEntry, ...]) -> dict[tuple[str, ...], tuple[int, int, int]]:
    return {(e.axis, e.collective, e.phase, e.what): (e.group_size, e.calls, e.total_bytes) for e in entries}


@pytest.mark.parametrize(("family", "changes", "config"), CASES)
def test_recorded_ledger_equals_the_predicted_one(family: str, changes: dict[str, Any], config: HybridParallelConfig):
    model = tiny(family, **changes)
    recorded = run_ranks(config.world_size, record_a_step, model, config)
    assert len(recorded) == config.world_size
    for stage, place, entries in recorded:
        assert lines(entries) == lines(predicted(model, config, stage, place))


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16, Precision.FP32])
def test_gradient_bytes_are_those_predicted_for_any_format_stage_and_number_of_microbatches(
    precision: Precision, zero: int, microbatches: int
):
    test_recorded_ledger_equals_the_predicted_one(
        "llama", {}, layout(dp=2, zero=zero, global_batch=2 * microbatches, precision=precision)
    )


def record_balanced(model: Any, config: HybridParallelConfig) -> tuple[int, RankPlace, tuple[TrafficEntry, ...]]:
    return record_a_step(model, config, routing=Routing.BALANCED)


@pytest.mark.parametrize(("family", "config"), EXPERTS)
def test_with_balanced_routing_the_ledger_of_experts_equals_the_predicted_one(
    family: str, config: HybridParallelConfig
):
    model = tiny(family)
    for stage, place, entries in run_ranks(config.world_size, record_balanced, model, config):
        assert lines(entries) == lines(predicted(model, config, stage, place))


@pytest.mark.parametrize(("family", "config"), LOSSES)
def test_the_load_balancing_loss_is_in_the_predicted_ledger(family: str, config: HybridParallelConfig):
    model = tiny(family, **BALANCING)
    for stage, place, entries in run_ranks(config.world_size, record_balanced, model, config):
        assert any(e.what == "router balance" for e in entries) is (family != "deepseek_v3")
        assert lines(entries) == lines(predicted(model, config, stage, place))


def test_with_the_models_routing_calls_are_the_predicted_ones_and_bytes_in_the_sum_over_ranks():
    config = layout(dp=2, tp=2, ep=2, expert_tp=2, **FP32)
    model = tiny("mixtral")
    expected = lines(predicted(model, config, 0, RankPlace()))
    ranks = [lines(entries) for _, _, entries in run_ranks(config.world_size, record_a_step, model, config)]
    assert any(rank != expected for rank in ranks)  # else the router was balanced and nothing is shown
    for line, (size, calls, total) in expected.items():
        assert {rank[line][:2] for rank in ranks} == {(size, calls)}
        assert sum(rank[line][2] for rank in ranks) == total * len(ranks)


def test_a_recorder_that_is_switched_off_records_nothing():
    assert run_ranks(2, record_switched_off) == [(), ()]


def record_switched_off() -> tuple[TrafficEntry, ...]:
    config = layout(tp=2, **FP32)
    groups = ProcessGroupManager(config, Device("cpu", "gloo"))
    groups.recorder.enabled = False
    model = tiny()
    engine = build_engine(config, model, groups, SeededWeights(model, family_of(model), 0), EngineOptions(seq=SEQ))
    tokens = torch.randint(0, 90, (config.global_batch, SEQ))
    engine.step(tokens, tokens)
    return groups.recorder.traffic()
