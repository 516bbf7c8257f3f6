"""Models from the shape of a measurement row and from a parameter count alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.models import Attention, MoeMlp, from_shape, load, typical_shape

# Model objects of rows of the published measurements, as they are.
ROWS: list[dict[str, Any]] = [
    {"name": "GPT-1.7B", "layers": 24, "hidden": 2304, "heads": 24, "kv_heads": 24, "head_dim": 96, "ffn": 9216}
    | {"vocab": 51200, "gated_mlp": False, "tied_embeddings": True, "attention": "mha", "experts": None}
    | {"params_b": 1.6468},
    {"name": "Llama-3-70B", "layers": 80, "hidden": 8192, "heads": 64, "kv_heads": 8, "head_dim": 128, "ffn": 28672}
    | {"vocab": 128256, "gated_mlp": True, "tied_embeddings": False, "attention": "gqa", "params_b": 70.5524},
    {"name": "Nemotron4-340B", "layers": 96, "hidden": 18432, "heads": 96, "kv_heads": 8, "head_dim": 192}
    | {"ffn": 73728, "vocab": 256000, "gated_mlp": False, "tied_embeddings": False, "attention": "gqa"}
    | {"params_b": 341.0221},
    {"name": "GPT-OSS-120B", "layers": 36, "hidden": 2880, "heads": 64, "kv_heads": 8, "head_dim": 64, "ffn": 2880}
    | {"vocab": 201088, "gated_mlp": True, "tied_embeddings": False, "attention": "gqa", "experts": 128, "topk": 4}
    | {"moe_ffn": 2880, "dense_layers": 0, "sliding_window": 128, "sliding_window_every": 2, "params_b": 116.7888},
    {"name": "DeepSeek-V3", "layers": 61, "hidden": 7168, "heads": 128, "kv_heads": 128, "head_dim": 56}
    | {"ffn": 18432, "vocab": 129280, "gated_mlp": True, "tied_embeddings": False, "attention": "mla"}
    | {"experts": 256, "topk": 8, "moe_ffn": 2048, "shared_expert_ffn": 2048, "dense_layers": 3, "mtp_layers": 1}
    | {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_dim": 128, "qk_rope_dim": 64, "v_head_dim": 128}
    | {"params_b": 671.0254},
    {"name": "Moonlight-16B-A3B", "layers": 27, "hidden": 2048, "heads": 16, "kv_heads": 16, "head_dim": 128}
    | {"ffn": 11264, "vocab": 163840, "gated_mlp": True, "tied_embeddings": False, "attention": "mla", "experts": 64}
    | {"topk": 6, "moe_ffn": 1408, "shared_expert_ffn": 2816, "dense_layers": 1, "kv_lora_rank": 512}
    | {"qk_nope_dim": 128, "qk_rope_dim": 64, "v_head_dim": 128, "params_b": 15.96},
]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r["name"])
def test_rows_have_their_stated_parameter_count(row: dict[str, Any]) -> None:
    assert from_shape(row).parameters / 1e9 == pytest.approx(row["params_b"], rel=0.01)


def test_a_row_has_the_same_products_as_the_catalogued_model() -> None:
    row, listed = from_shape(ROWS[4]), load("deepseek-v3")
    for mine, theirs in zip(row.kinds, listed.kinds, strict=True):
        assert mine.matmuls == theirs.matmuls
        assert mine.mixer == theirs.mixer
        assert mine.mlp == theirs.mlp
    assert row.pattern == listed.pattern
    assert row.mtp_layers == 1


def test_windows_alternate_as_the_row_says() -> None:
    model = from_shape(ROWS[3])
    windows = [k.mixer.window for k in model.kinds if isinstance(k.mixer, Attention)]
    assert [windows[k] for k in model.pattern[:4]] == [128, None, 128, None]
    assert all(isinstance(k.mlp, MoeMlp) for k in model.kinds)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 0},
        {"hidden": -1},
        {"heads": "many"},
        {"vocab": None},
        {"kv_heads": 7},
        {"attention": "none"},
        {"gated_mlp": 1},
        {"ffn": 10**18},
        {"layers": True},
        {"experts": 4, "topk": 8, "moe_ffn": 64},
    ],
)
def test_shapes_that_make_no_sense_are_input_errors(change: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        from_shape(ROWS[1] | change)
    assert "\n" not in str(caught.value)


@given(st.floats(math.log(0.1), math.log(2000)))
def test_typical_shapes_are_within_5_percent_of_the_request(exponent: float) -> None:
    params_b = min(2000.0, max(0.1, math.exp(exponent)))
    model = typical_shape(params_b)
    assert model.parameters / 1e9 == pytest.approx(params_b, rel=0.05)
    attention = model.kinds[0].mixer
    assert isinstance(attention, Attention)
    assert attention.heads % 8 == 0
    assert attention.kv_heads == 8


@pytest.mark.parametrize(
    ("params_b", "layers", "hidden"), [(175, 96, None), (70, 80, None), (70, 80, 8192), (8, None, 4096), (7, 12, None)]
)
def test_depth_and_width_that_are_given_are_kept(params_b: float, layers: int | None, hidden: int | None) -> None:
    model = typical_shape(params_b, layers, hidden)
    assert model.parameters / 1e9 == pytest.approx(params_b, rel=0.05)
    assert layers in (None, model.num_layers)
    assert hidden in (None, model.hidden)


def test_a_typical_70b_is_llama_3s_shape() -> None:
    model = typical_shape(70)
    assert (model.num_layers, model.hidden) == (80, 8192)


@pytest.mark.parametrize("params_b", [0, -1, math.nan, math.inf, 0.01, 1e6, True])
def test_sizes_that_are_no_model_are_input_errors(params_b: float) -> None:
    with pytest.raises(InputError, match=r"from 0\.1 to 2000 billion"):
        typical_shape(params_b)


@pytest.mark.parametrize(("layers", "hidden"), [(0, None), (None, 0), (2, 128), (1000, 16384), (True, None)])
def test_depth_or_width_that_cannot_be_is_an_input_error(layers: int | None, hidden: int | None) -> None:
    with pytest.raises(InputError):
        typical_shape(70, layers, hidden)
