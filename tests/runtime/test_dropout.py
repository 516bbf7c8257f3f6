"""Dropout is the same on every layout, recomputed or not; it drops the share asked for, and evaluation has none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from meshwright.layout.config import HybridParallelConfig, Recompute
from meshwright.runtime.dropout import DropoutState
from meshwright.runtime.engine import EngineOptions, build_engine
from meshwright.runtime.families import family_of
from meshwright.runtime.float64 import keep_float64, recompute_contexts
from meshwright.runtime.launch import Device, run_ranks
from meshwright.runtime.process_groups import ProcessGroupManager
from meshwright.runtime.weights import SeededWeights

from .layouts import INTERLEAVED, SEQ, layout
from .tiny import tiny

BATCH = 8
DROPPING: dict[str, dict[str, Any]] = {
    "gpt2": {"attn_pdrop": 0.2, "resid_pdrop": 0.3, "embd_pdrop": 0.1},
    "gpt_neox": {"attention_dropout": 0.2, "hidden_dropout": 0.3},
    "qwen3": {"attention_dropout": 0.3},
}


def losses(model: Any, config: HybridParallelConfig, seed: int) -> tuple[list[float], float]:
    """Of three steps in float64, and of an evaluation after them."""
    groups = ProcessGroupManager(config, Device("cpu", "gloo"))
    options = EngineOptions(
        seq=SEQ,
        dtype=torch.float64,
        seed=seed,
        forward_context=keep_float64,
        recompute_contexts=recompute_contexts,
    )
    engine = build_engine(config, model, groups, SeededWeights(model, family_of(model), 0), options)
    tokens = torch.randint(0, 90, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    share = BATCH // config.dp
    own = tokens[groups.axis("dp").rank * share :][:share]
    return [engine.step(own, own).loss for _ in range(3)], engine.evaluate(own, own)


def run(model: Any, seed: int = 0, **sizes: Any) -> tuple[list[float], float]:
    config = replace(layout(**sizes), global_batch=BATCH)
    return run_ranks(config.world_size, losses, model, config, seed)[0]


CASES = [
    ("gpt2", {"tp": 2, "sequence_parallel": True, "dp": 2, "zero": 3}),
    ("gpt2", {"pp": 2, "recompute": Recompute.FULL, **INTERLEAVED}),
    ("gpt_neox", {"tp": 2, "pp": 2, "recompute": Recompute.SELECTIVE}),
    ("qwen3", {"tp": 4, "micro_batch": 4}),
]


@pytest.mark.parametrize(("family", "sizes"), CASES)
def test_masks_do_not_depend_on_the_layout(family: str, sizes: dict[str, Any]):
    model = tiny(family, **DROPPING[family])
    one, evaluated = run(model)
    split, evaluated_split = run(model, **sizes)
    assert split == pytest.approx(one, rel=1e-11)
    assert evaluated_split == pytest.approx(evaluated, rel=1e-11)


def test_another_seed_drops_others_and_evaluation_drops_nothing():
    model = tiny("gpt2", **DROPPING["gpt2"])
    still, evaluated = run(tiny("gpt2"))
    dropped, _ = run(model)
    assert dropped[0] != pytest.approx(still[0], rel=1e-6)
    assert run(model, seed=1)[0][0] != pytest.approx(dropped[0], rel=1e-6)
    assert evaluated < still[0]


def test_masks_differ_by_place_sequence_and_step_and_drop_their_share():
    state = DropoutState(seed=7)
    first = state.mask("a", 0.3, (2, 100, 64), torch.device("cpu"))
    assert float(first.double().mean()) == pytest.approx(0.7, abs=0.02)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, state.mask("b", 0.3, (2, 100, 64), torch.device("cpu")))
    with state.on(sequence=1, active=True):
        assert torch.equal(first[1], state.mask("a", 0.3, (1, 100, 64), torch.device("cpu"))[0])
    state.step = 1
    assert not torch.equal(first, state.mask("a", 0.3, (2, 100, 64), torch.device("cpu")))
