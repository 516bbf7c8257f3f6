"""Which models run, which are refused and why; weights that do not depend on the layout; shrinking for parity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig
from meshwright.models.load import catalogue
from meshwright.plan import ModelSection, Plan, TrainingWorkload
from meshwright.runtime.families import family_of, supported_model_types
from meshwright.runtime.launch import Device, run_ranks
from meshwright.runtime.model_config import config_from_values, transformers_config
from meshwright.runtime.parallelize import Splitter
from meshwright.runtime.parity_axes import describe, only, smaller_combinations
from meshwright.runtime.parity_shape import refuse_too_many_ranks, shrunk, without_dropout
from meshwright.runtime.process_groups import ProcessGroupManager
from meshwright.runtime.slices import TensorSlice
from meshwright.runtime.tensor_parallel import TensorParallelRegion
from meshwright.runtime.weights import SeededWeights, meta_model, reference_model

from .layouts import INTERLEAVED, layout
from .tiny import SHAPES, tiny


def test_every_family_of_the_issue_is_supported():
    assert set(supported_model_types()) == set(SHAPES)


def test_an_unknown_family_is_refused_with_what_is_known():
    with pytest.raises(InputError, match=r"'mamba2' cannot be run.*known are deepseek_v2, .*gemma3_text, gpt2"):
        family_of(AutoConfig.for_model("mamba2"))


@pytest.mark.parametrize(
    ("family", "changes", "part"),
    [
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
    ],
)
def test_a_part_that_is_not_described_is_named(family: str, changes: dict[str, Any], part: str):
    config = tiny(family)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(InputError, match=part):
        family_of(config)


def split_a_layer_with_an_unknown_part() -> None:
    groups = ProcessGroupManager(HybridParallelConfig(tp=2), Device("cpu", "gloo"))
    config = tiny("llama")
    layer = meta_model(config).get_submodule("model.layers.0")
    layer.add_module("adapter", torch.nn.Linear(4, 4, device="meta"))
    splitter = Splitter(family_of(config), config, TensorParallelRegion(groups.axis("tp")))
    with pytest.raises(InputError, match=r"not known how model\.layers\.0\.adapter\.weight splits"):
        splitter.layer(layer, "model.layers.0.")


def test_a_parameter_that_the_family_does_not_know_is_refused_by_name():
    run_ranks(2, split_a_layer_with_an_unknown_part)


def test_seeded_weights_are_those_of_the_reference_model_whatever_is_read_first():
    config = tiny("gpt2")
    whole = dict(reference_model(config, 3, torch.float32).named_parameters())
    source = SeededWeights(config, family_of(config), 3)
    other = SeededWeights(config, family_of(config), 4)
    for name in reversed(whole):
        piece = TensorSlice(name, tuple(whole[name].shape))
        assert torch.equal(source.read(piece), whole[name])
        if whole[name].std() > 0:
            assert not torch.equal(other.read(piece), whole[name])


def test_residual_projections_of_gpt2_keep_their_own_smaller_scale():
    weights = reference_model(tiny("gpt2", hidden=64), 0, torch.float32).state_dict()
    scaled = weights["transformer.h.0.attn.c_proj.weight"].std() / weights["transformer.h.0.attn.c_attn.weight"].std()
    assert float(scaled) == pytest.approx((2 * 4) ** -0.5, rel=0.1)


def test_every_catalogued_model_of_a_supported_family_gives_a_config_that_can_be_shrunk():
    checked = 0
    for entry in catalogue():
        plan = Plan(
            version=1,
            model=ModelSection(name=entry.name),
            workload=TrainingWorkload(seq=16),
            parallel=HybridParallelConfig(tp=2, pp=2, global_batch=4),
        )
        try:
            config = transformers_config(plan)
        except InputError:
            continue
        if config.num_attention_heads % 2:
            continue
        small, _ = shrunk(config, plan.parallel, 16)
        assert small.model_type == config.model_type
        assert small.num_attention_heads % 2 == 0
        assert sum(p.numel() for p in meta_model(small).parameters()) < 2_000_000
        checked += 1
    assert checked > 20


def test_parity_switches_dropout_off():
    assert without_dropout(tiny("gpt2", attn_pdrop=0.1, resid_pdrop=0.2)).resid_pdrop == 0.0
    assert without_dropout(tiny("llama", attention_dropout=0.1)).attention_dropout == 0.0


def test_shrinking_keeps_what_a_layout_can_get_wrong():
    config = tiny("qwen2", heads=32, kv_heads=8, vocab=151937, hidden=128, layers=28)
    small, plan = shrunk(config, HybridParallelConfig(tp=4, pp=2, layer_split=(15, 13), global_batch=64), 16)
    assert plan.layer_split == (2, 2)
    assert small.num_hidden_layers == 4
    assert small.num_key_value_heads < small.num_attention_heads
    assert small.vocab_size % 4
    few, _ = shrunk(tiny("qwen2", heads=16, kv_heads=2, hidden=128), HybridParallelConfig(tp=4), 16)
    assert few.num_key_value_heads == 2


def test_too_many_ranks_for_one_machine_are_refused_with_what_to_do():
    with pytest.raises(InputError, match=r"64 ranks, more than the 16.*like dp 2, pp 2, tp 2"):
        refuse_too_many_ranks(HybridParallelConfig(dp=64, global_batch=64))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "no-such-model"}, "does not know model type 'no-such-model'"),
        ({"model_type": "llama", "hidden_size": "wide"}, "refuses this config"),
        ({"model_type": ["llama"]}, "does not know model type"),
        ({"model_type": "llama", "quantization_config": {"bits": 8}}, "quantised weights cannot be trained"),
        ({}, "does not know model type None"),
    ],
)
def test_bad_model_configs_are_input_errors(values: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        config_from_values(values, "model")


def test_combinations_of_axes_keep_only_what_belongs_to_them():
    config = layout(dp=2, pp=2, tp=2, zero=3, sequence_parallel=True, **INTERLEAVED)
    assert list(smaller_combinations(config)) == [("dp",), ("pp",), ("tp",), ("dp", "pp"), ("dp", "tp"), ("pp", "tp")]
    assert describe(config) == "dp2 zero3 x pp2 interleaved-1f1b vpp2 x tp2 sp"
    assert describe(only(config, ("dp",))) == "dp2 zero3"
    assert describe(only(config, ("tp",))) == "tp2 sp"
    assert only(config, ("tp",)).world_size == 2
