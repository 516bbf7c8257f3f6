"""Stored bytes of quantised checkpoints against their published sizes, and what the configs may say."""

from __future__ import annotations

from typing import Any

import pytest

from meshwright.errors import InputError
from meshwright.models import ModelSpec, Part, load

DENSE: dict[str, Any] = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DENSE |= {"intermediate_size": 128, "vocab_size": 100}
LAYER = 2 * (4 * 64 * 64 + 3 * 64 * 128)


def with_quantization(section: object) -> ModelSpec:
    return ModelSpec.from_config(DENSE | {"quantization_config": section})


@pytest.mark.parametrize(
    ("name", "published_gb"),
    [  # size of the safetensors files on the hub (gpt-oss: 60.8 and 12.8 GiB by its model card; Kimi-K3: 1.56 TB)
        ("gpt-oss-120b", 65.3),
        ("gpt-oss-20b", 13.76),
        ("kimi-k3", 1560),
        ("llama-3.1-70b", 141.1),
        ("llama-3.1-70b-fp8", 72.7),
        ("qwen3-235b-a22b-nvfp4", 134),
    ],
)
def test_weight_bytes_are_near_the_published_size(name: str, published_gb: float) -> None:
    assert load(name).weight_bytes / 1e9 == pytest.approx(published_gb, rel=0.01)


def test_fp8_blocks_carry_one_fp32_scale_each() -> None:
    model = load("deepseek-v3")
    assert model.weight_bits == pytest.approx(8 + 32 / 128**2)
    by_part = {t.part: t.bits for k in model.kinds for t in k.tensors}
    assert by_part[Part.EXPERT] == by_part[Part.ATTENTION] == model.weight_bits
    assert by_part[Part.ROUTER] is None
    assert by_part[Part.NORM] is None
    assert all(t.bits is None for t in model.outer_tensors)


def test_modules_left_alone_keep_their_dtype() -> None:
    gpt_oss = {t.name: t.bits for t in load("gpt-oss-120b").kinds[0].tensors}
    assert gpt_oss["mlp.experts.gate_up_proj"] == 4.25
    assert gpt_oss["self_attn.q_proj.weight"] is None
    kimi = {t.name: t.bits for k in load("kimi-k3").kinds for t in k.tensors}
    assert kimi["mlp.experts.down_proj"] == 4.25
    assert kimi["self_attn.o_proj.weight"] is kimi["mlp.shared_experts.up_proj.weight"] is None
    assert kimi["mlp.gate_proj.weight"] is None  # the dense layer, by the pattern mlp\.(gate|up|gate_up|down)_proj
    v4 = {t.name: t.bits for k in load("deepseek-v4-pro").kinds for t in k.tensors}
    assert v4["mlp.experts.down_proj"] == 4.25  # expert_dtype fp4
    assert v4["self_attn.q_b_proj.weight"] == pytest.approx(8.002, abs=1e-3)


@pytest.mark.parametrize(
    ("section", "bits"),
    [
        ({"quant_method": "fp8"}, 8.0),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}, 4 + 16 / 64),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8.0),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4.5),
        ({"quant_algo": "FP8"}, 8.0),
        ({"quant_method": "modelopt_fp4", "quant_algo": "NVFP4"}, 4.5),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4"}}}, 4.25),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
            },
            4.5,
        ),
    ],
)
def test_methods_store_so_many_bits(section: dict[str, Any], bits: float) -> None:
    model = with_quantization(section)
    assert model.weight_bits == pytest.approx(bits)
    assert model.weight_bytes == pytest.approx((LAYER * bits + (model.parameters - LAYER) * 16) / 8)


@pytest.mark.parametrize(
    "section",
    [
        {"quant_method": "magic"},
        {},
        [],
        "fp8",
        {"quant_method": 8},
        {"quant_method": "awq"},
        {"quant_method": "awq", "bits": 0},
        {"quant_method": "awq", "bits": 4, "group_size": -1},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": {"a": 3}},
        {"quant_method": "fp8", "ignored_layers": 3},
        {"quant_method": "fp8", "ignore": ["re:(a+)+$"]},
        {"quant_method": "fp8", "ignore": ["x" * 10_000]},
        {"quant_algo": "SOMETHING"},
        {"quant_method": "quark"},
        {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp3"}}},
    ],
)
def test_sections_that_make_no_sense_are_input_errors(section: object) -> None:
    with pytest.raises(InputError) as caught:
        with_quantization(section)
    assert "\n" not in str(caught.value)


def test_names_globs_and_patterns_ignore_modules() -> None:
    for ignored in (
        ["q_proj"],
        ["model.layers.0.self_attn.q_proj"],
        ["model.layers.1.self_attn.q_proj"],
        ["*.self_attn.q_proj"],
        ["re:.*self_attn\\.(q|z)_proj$"],
    ):
        model = with_quantization({"quant_method": "fp8", "ignore": ignored})
        assert [t.name for t in model.kinds[0].tensors if t.bits is None and len(t.shape) == 2] == [
            "self_attn.q_proj.weight"
        ], ignored


def test_a_folder_with_nvidias_own_quantization_file_is_read(tmp_path: Any) -> None:
    import json

    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    quantization = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(quantization))
    assert ModelSpec.from_config(tmp_path).weight_bits == 8.0
