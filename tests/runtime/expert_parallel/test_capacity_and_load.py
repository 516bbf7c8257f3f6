"""Tokens beyond the experts' capacity, and the report of where tokens went."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from meshwright.layout.config import HybridParallelConfig
from meshwright.runtime.engine import Engine, EngineOptions, build_engine
from meshwright.runtime.expert_parallel import Routing
from meshwright.runtime.expert_parallel.load import RouterLoad
from meshwright.runtime.float64 import keep_float64
from meshwright.runtime.launch import Device, run_ranks
from meshwright.runtime.process_groups import ProcessGroupManager
from meshwright.runtime.weights import SeededWeights, reference_model

from ..layouts import SEQ, layout
from ..tiny import tiny

MODEL = tiny("mixtral")  # 4 layers, 4 experts, 2 per token


def engine_of(config: HybridParallelConfig, **options: Any) -> Engine:
    groups = ProcessGroupManager(config, Device("cpu", "gloo"))
    chosen = EngineOptions(seq=SEQ, dtype=torch.float64, forward_context=keep_float64, **options)
    return build_engine(config, MODEL, groups, SeededWeights.of(MODEL, 0), chosen)


def step(config: HybridParallelConfig, options: dict[str, Any]) -> tuple[float, float, RouterLoad]:
    engine = engine_of(config, **options)
    tokens, labels = batch(config.global_batch)
    own = slice(engine.groups.axis("dp").rank * len(tokens) // config.dp, None)
    own = slice(own.start, own.start + len(tokens) // config.dp)
    result = engine.step(tokens[own], labels[own])
    load = engine.router_load()
    assert load is not None
    return result.loss, result.gradient_norm, load


def batch(sequences: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 96, (sequences, SEQ + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def test_every_copy_is_reported_by_expert_and_by_rank_on_all_ranks_alike():
    config = layout(dp=2, tp=2, ep=2, pp=2)
    (_, _, load), *others = run_ranks(8, step, config, {})
    assert all(other == load for _, _, other in others)
    copies = config.global_batch * SEQ * 2 * 4
    assert sum(load.tokens_per_expert) == sum(load.rows_per_rank) == copies
    assert (len(load.tokens_per_expert), len(load.rows_per_rank)) == (4, 8)
    assert set(load.imbalance_per_layer) == {0, 1, 2, 3}
    assert all(value > 1 for value in load.imbalance_per_layer.values())
    assert load.dropped == 0


def test_balanced_routing_gives_every_expert_and_rank_the_same():
    (_, _, load), *_ = run_ranks(4, step, layout(dp=2, tp=2, ep=4), {"routing": Routing.BALANCED})
    assert len(set(load.tokens_per_expert)) == len(set(load.rows_per_rank)) == 1
    assert set(load.imbalance_per_layer.values()) == {1.0}


def test_a_capacity_that_holds_all_copies_changes_nothing_but_the_padding():
    config = layout(dp=2, ep=2, tp=2, expert_tp=2)
    (loss, norm, load), *_ = run_ranks(4, step, config, {})
    (roomy_loss, roomy_norm, roomy), *_ = run_ranks(4, step, config, {"capacity_factor": 2.0})  # experts / top-k
    assert (roomy_loss, roomy_norm) == (pytest.approx(loss, rel=1e-13), pytest.approx(norm, rel=1e-13))
    assert roomy.tokens_per_expert == load.tokens_per_expert
    assert roomy.dropped == 0
    assert sum(roomy.rows_per_rank) == 2 * sum(load.rows_per_rank)


def without_what_is_dropped(capacity: int) -> Any:
    """A hook that takes the weight from copies beyond the capacity, counted one by one in the order of tokens."""

    def hook(_router: nn.Module, _args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, chosen = output
        filled = [0] * 4
        kept = torch.ones_like(weights)
        for token, experts in enumerate(chosen.tolist()):
            for slot, expert in enumerate(experts):
                kept[token, slot] = float(filled[expert] < capacity)
                filled[expert] += 1
        return logits, weights * kept, chosen

    return hook


def test_copies_beyond_the_capacity_add_nothing_to_their_token():
    config = layout(global_batch=1)
    [(loss, norm, load)] = run_ranks(1, step, config, {"capacity_factor": 1.0})
    assert load.dropped > 0
    model = reference_model(MODEL, 0, torch.float64)
    for module in model.modules():
        if isinstance(module, MixtralTopKRouter):
            module.register_forward_hook(without_what_is_dropped(SEQ * 2 // 4))
    tokens, labels = batch(1)
    with keep_float64():
        logits = model(tokens, use_cache=False).logits
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected.backward()
    squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
    assert loss == pytest.approx(float(expected.detach()), rel=1e-13)
    assert norm == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-12)
