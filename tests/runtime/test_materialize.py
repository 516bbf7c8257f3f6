"""Each rank fills only its own stage and shards: exactly the elements that the cost model gives it, none on meta."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from meshwright.layout.config import HybridParallelConfig
from meshwright.layout.split import layer_ranges
from meshwright.models import ModelSpec
from meshwright.models.counting import rank_parameters
from meshwright.runtime.engine import EngineOptions, build_engine
from meshwright.runtime.families import family_of
from meshwright.runtime.launch import Device, run_ranks
from meshwright.runtime.process_groups import ProcessGroupManager
from meshwright.runtime.weights import SeededWeights

from .layouts import INTERLEAVED, SEQ, layout
from .tiny import tiny


def elements(model: Any, config: HybridParallelConfig) -> tuple[int, int, int]:
    """(held by this rank, owned by this rank, expected by the cost model)."""
    groups = ProcessGroupManager(config, Device("cpu", "gloo"))
    engine = build_engine(config, model, groups, SeededWeights(model, family_of(model), 0), EngineOptions(seq=SEQ))
    for module in engine.chunks.values():
        assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    held = sum(p.local.numel() for p in engine.parameters)
    owned = sum(p.local.numel() for p in engine.parameters if engine.owns(p))
    place = SimpleNamespace(**{axis: groups.axis(axis).rank for axis in ("dp", "pp", "cp", "tp")})
    ranges = layer_ranges(config, model.num_hidden_layers)
    chunks = [(ranges[c].start, ranges[c].stop) for c in engine.chunks]
    last = len(ranges) - 1 in engine.chunks
    spec = ModelSpec.from_config(model.to_dict())
    return held, owned, rank_parameters(spec, config, place, chunks, last=last)


@pytest.mark.parametrize(
    ("family", "changes", "config"),
    [
        ("llama", {"tie_word_embeddings": True}, layout(pp=2, tp=2)),
        ("qwen3", {"vocab": 97}, layout(tp=4)),
        ("phi3", {}, layout(pp=2, tp=2, **INTERLEAVED)),
        ("gpt2", {}, layout(tp=2)),
    ],
)
def test_ranks_hold_what_the_cost_model_counts_and_together_own_the_model(
    family: str, changes: dict[str, Any], config: HybridParallelConfig
):
    model = tiny(family, **changes)
    found = run_ranks(config.world_size, elements, model, config)
    for held, _, expected in found:
        assert held == expected
    assert sum(owned for _, owned, _ in found) == ModelSpec.from_config(model.to_dict()).parameters


def test_zero_3_spreads_the_elements_over_dp():
    model = tiny()
    config = layout(dp=2, zero=3)
    found = run_ranks(2, elements, model, config)
    assert [2 * held for held, _, _ in found] == [expected for _, _, expected in found]
    assert sum(owned for _, owned, _ in found) == ModelSpec.from_config(model.to_dict()).parameters
