"""Reading configs: wrappers, windows, and everything that is not a config."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.models import Attention, LinearMixer, ModelSpec, MoeMlp, catalogue, load
from meshwright.models.families.kin import TRAITS
from meshwright.models.families.registry import FAMILIES

LLAMA: dict[str, Any] = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"intermediate_size": 128, "vocab_size": 100}
CONFIGS = {e.name: json.loads(e.config_file.read_text()) for e in catalogue()}


def message_of(config: Any) -> str:
    with pytest.raises(InputError) as caught:
        ModelSpec.from_config(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_family_names_the_nearest() -> None:
    assert "unknown model_type 'lama' (did you mean llama" in message_of(LLAMA | {"model_type": "lama"})
    assert "known: " in message_of(LLAMA | {"model_type": "zzzzzzzz"})


@pytest.mark.parametrize("family", ["t5", "mamba", "rwkv", "bert", "whisper", "jamba"])
def test_architectures_that_are_not_read_are_refused(family: str) -> None:
    assert "unknown model_type" in message_of(LLAMA | {"model_type": family})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "big"}, "hidden_size must be a whole number, got 'big'"),
        ({"hidden_size": True}, "hidden_size must be a whole number, got True"),
        ({"hidden_size": 64.5}, "hidden_size must be a whole number, got 64.5"),
        ({"hidden_size": 0}, "hidden_size must be from 1"),
        ({"hidden_size": -4}, "hidden_size must be from 1"),
        ({"hidden_size": 10**18}, "hidden_size must be from 1 to 10000000"),
        ({"hidden_size": float("nan")}, "hidden_size must be a whole number, got nan"),
        ({"hidden_size": [64]}, "hidden_size must be a whole number, got a list"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers must be from 1 to 10000"),
        ({"num_attention_heads": 3}, "hidden_size 64 is not a multiple of num_attention_heads 3"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, got 'yes'"),
        ({"model_type": None}, "model_type is missing"),
        ({"model_type": 3}, "model_type must be text, got 3"),
        ({"torch_dtype": "bfloat17"}, "unknown dtype 'bfloat17' (did you mean bfloat16"),
        ({"text_config": 3}, "text_config must be an object, got 3"),
        ({"hidden_size": 10**7, "intermediate_size": 10**7, "num_hidden_layers": 10**4}, "parameters; at most"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(change: dict[str, Any], message: str) -> None:
    assert message in message_of(LLAMA | change)


@pytest.mark.parametrize("values", [[], [1, 2], "llama", 3, None, True])
def test_what_is_not_an_object_is_refused(values: Any, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    assert "must be a JSON object" in message_of(file)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"model_type": "llama", "hidden_size": 40',
        b"\xff\xfe\x00bad",
        b"not json",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"model_type": "llama", "hidden_size": ' + b"9" * 10_000 + b"}",
        b'{"model_type": "llama", "hidden_size": NaN}',
        b"\x00" * 100,
    ],
    ids=lambda c: repr(c[:12]),
)
def test_hostile_files_are_one_line(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    message_of(file)
    message_of(tmp_path)


def test_files_that_are_missing_or_too_large_are_one_line(tmp_path: Path) -> None:
    assert "no such config.json" in message_of(tmp_path)
    assert "no such config.json" in message_of(tmp_path / "config.json")
    file = tmp_path / "config.json"
    file.write_text('{"a": "' + "x" * (17 * 2**20) + '"}')
    assert "too large for a config.json" in message_of(file)


def test_names_from_the_file_cannot_break_the_line(tmp_path: Path) -> None:
    odd = tmp_path / "two\nlines"
    assert "two?lines: no such config.json" in message_of(odd)
    message_of({"hidden\n_size": 3, "model_type": "llama"})
    groups = {"a\nb": {"weights": {"num_bits": "x"}}}
    message_of(LLAMA | {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}})
    assert len(message_of(LLAMA | {"model_type": "qwen2", "layer_types": ["x" * 9000] * 2})) < 400


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.one_of(st.integers(-5, 5), st.text(max_size=3)), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(max_examples=600)
@given(st.data())
def test_any_config_with_junk_in_it_is_read_or_refused_in_one_line(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(CONFIGS)))
    config = copy.deepcopy(CONFIGS[name])
    inner = config.get("text_config", config)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(inner)))
        if data.draw(st.booleans()):
            inner[key] = data.draw(JUNK)
        else:
            inner.pop(key, None)
    message = ""
    try:
        model = ModelSpec.from_config(config)
    except InputError as error:
        message = str(error)
    else:
        assert model.parameters > 0
        assert len(model.pattern) == model.num_layers > 0
    assert "\n" not in message
    assert len(message) < 1000


def test_a_wrapper_gives_its_text_model() -> None:
    inner = LLAMA | {"num_hidden_layers": 3}
    wrapped = {"model_type": "some_vision_model", "text_config": inner, "vision_config": {"hidden_size": 9}}
    assert ModelSpec.from_config(wrapped).num_layers == 3
    assert not ModelSpec.from_config(wrapped).tied_embeddings
    assert ModelSpec.from_config(wrapped | {"tie_word_embeddings": True}).tied_embeddings
    wrapped["quantization_config"] = {"quant_method": "fp8"}
    assert ModelSpec.from_config(wrapped).weight_bits == 8.0


def test_gemma_3s_own_configs_leave_heads_to_their_defaults() -> None:
    published = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    wrapped = {"model_type": "gemma3", "text_config": published | {"model_type": "gemma3_text"}}
    assert ModelSpec.from_config(wrapped).parameters == load("gemma-3-4b").parameters


def test_every_family_has_a_catalogued_model_or_a_variant_compared_with_transformers() -> None:
    seen = {c.get("text_config", c)["model_type"] for c in CONFIGS.values()}
    rest = {"deepseek_v32", "qwen3_5_text", "minimax_m3_vl_text", "step3p5", "qwen2_vl_text", "qwen2_5_vl_text"}
    assert set(FAMILIES) == seen | rest | {"glm4_moe_lite"} | set(TRAITS)


def windows(model: ModelSpec, first: int) -> list[int | None]:
    mixers = [model.kinds[k].mixer for k in model.pattern[:first]]
    return [m.window for m in mixers if isinstance(m, Attention)]


def test_windows_fall_on_the_layers_that_slide() -> None:
    assert windows(load("mistral-7b"), 2) == [4096, 4096]
    assert windows(load("mistral-7b-v0.3"), 2) == [None, None]
    assert windows(load("gemma-2-9b"), 4) == [4096, None, 4096, None]
    assert windows(load("gemma-3-27b"), 7) == [1024] * 5 + [None, 1024]
    assert windows(load("gpt-oss-120b"), 4) == [128, None, 128, None]
    assert windows(load("llama-4-maverick"), 5) == [8192, 8192, 8192, None, 8192]
    assert windows(load("mimo-v2-flash"), 7) == [None, 128, 128, 128, 128, None, 128]
    assert windows(load("qwen3-8b"), 2) == [None, None]
    sliding = ModelSpec.from_config(
        LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 16}
    )
    assert windows(sliding, 2) == [None, 16]


def test_hybrid_layers_are_priced_by_their_own_mixer() -> None:
    model = load("qwen3.5-122b-a10b")
    names = [type(model.kinds[k].mixer).__name__ for k in model.pattern]
    assert names == ["LinearMixer", "LinearMixer", "LinearMixer", "Attention"] * 12
    kimi = load("kimi-k3")
    mixers = [model.mixer for model in kimi.kinds]
    assert {m.name for m in mixers if isinstance(m, LinearMixer)} == {"kimi_delta_attention"}
    counts = kimi.layer_counts(0, 93)
    assert sum(n for n, k in zip(counts, kimi.kinds, strict=True) if isinstance(k.mixer, Attention)) == 24
    nemotron = load("nemotron-3-ultra-550b-a55b")
    by_name = {k.name: k for k in nemotron.kinds}
    assert by_name["moe"].mixer is None
    assert by_name["mamba"].mlp is None
    experts = by_name["moe"].mlp
    assert isinstance(experts, MoeMlp)
    assert (experts.latent, experts.gated, experts.top_k) == (2048, False, 22)


def test_sparse_layers_know_their_indexer() -> None:
    model = load("glm-5.2")
    mixers = [model.kinds[k].mixer for k in model.pattern]
    indexed = [m.indexer_heads for m in mixers if isinstance(m, Attention)]
    assert indexed[:8] == [32, 32, 32, 0, 0, 0, 32, 0]
    assert all(isinstance(m, Attention) and m.top_k_keys == 2048 for m in mixers)


def test_products_hold_the_weights_of_their_tensors() -> None:
    for entry in catalogue():
        model = load(entry.name)
        for kind in model.kinds:
            matrices = sum(
                t.size
                for t in kind.tensors
                if (len(t.shape) == 2 or t.experts) and "bias" not in t.name and "norm" not in t.name
            )
            products = sum(m.k * m.n * max(1, m.experts) for m in kind.matmuls)
            assert products == matrices, (entry.name, kind.name)


def test_prediction_modules_are_counted_apart() -> None:
    model = load("deepseek-v3")  # 685B on the hub: 671B and one module of 11.5B with copies of embedding and head
    assert model.mtp_layers == 1
    assert model.parameters + model.mtp_parameters + 2 * 129280 * 7168 == pytest.approx(684.5e9, rel=0.001)
