"""Hugging Face safetensors in and out: what transformers saved comes back through any layout, equal to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig, Precision
from meshwright.runtime.checkpoint import DataPosition, save
from meshwright.runtime.engine import EngineOptions, build_engine
from meshwright.runtime.launch import Device, run_ranks
from meshwright.runtime.process_groups import ProcessGroupManager
from meshwright.runtime.safetensors_io import SafetensorsWeights, export_checkpoint, save_pretrained
from meshwright.runtime.slices import TensorSlice

from .jobs import SEQ, plan
from .layouts import layout
from .tiny import tiny


def saved_by_transformers(model: Any, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(model, dtype=dtype)
    for name, tensor in whole.state_dict().items():
        if name.endswith("e_score_correction_bias"):  # a buffer, zero at first
            tensor.uniform_()
    whole.save_pretrained(folder, **options)


def read_and_save(model: Any, config: HybridParallelConfig, source: Path, target: Path, limit: int) -> int:
    """Returns the largest number of elements that this rank holds of one tensor."""
    groups = ProcessGroupManager(config, Device("cpu", "gloo"))
    engine = build_engine(config, model, groups, SafetensorsWeights(source), EngineOptions(seq=SEQ))
    save_pretrained(engine, model, target, limit)
    return max(p.local.numel() for p in engine.parameters)


CASES = [
    ("llama", {"tie_word_embeddings": True}, {"tp": 2, "pp": 2, "sequence_parallel": True}, Precision.FP32),
    ("phi3", {"vocab": 97}, {"tp": 2, "pp": 2}, Precision.BF16),
    ("gpt2", {"tie_word_embeddings": True}, {"tp": 2, "dp": 2, "zero": 3}, Precision.FP32),
    ("mixtral", {}, {"tp": 2, "dp": 2, "ep": 2, "expert_tp": 2, "zero": 2}, Precision.FP32),
    ("deepseek_v3", {"layers": 2}, {"tp": 2, "ep": 2}, Precision.FP32),
    ("gpt_oss", {"layers": 2}, {"tp": 2, "expert_tp": 2}, Precision.FP32),
    ("qwen3", {"kv_heads": 1}, {"tp": 2, "dp": 2}, Precision.FP16),
]
DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


@pytest.mark.parametrize(("family", "changes", "sizes", "precision"), CASES, ids=[c[0] for c in CASES])
def test_a_model_goes_through_the_runtime_and_back_to_transformers_unchanged(
    tmp_path: Path, family: str, changes: dict[str, Any], sizes: dict[str, Any], precision: Precision
):
    model = tiny(family, **changes)
    saved_by_transformers(model, tmp_path / "in", DTYPES[precision])
    config = layout(precision=precision, **sizes)
    run_ranks(config.world_size, read_and_save, model, config, tmp_path / "in", tmp_path / "out", 20_000)
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("in", "out"))
    assert type(after) is type(before)
    assert after.dtype == DTYPES[precision]
    expected, got = before.state_dict(), after.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())


def test_files_are_cut_by_size_and_an_index_says_where_everything_is(tmp_path: Path):
    model = tiny()
    saved_by_transformers(model, tmp_path / "in", max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 3
    run_ranks(
        2, read_and_save, model, layout(tp=2, precision=Precision.FP32), tmp_path / "in", tmp_path / "out", 20_000
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert {f.name for f in files} == set(index["weight_map"].values())
    assert all(f.stat().st_size < 24_000 for f in files)
    assert not list((tmp_path / "out").glob(".*"))
    assert set(index["weight_map"]) == set(SafetensorsWeights(tmp_path / "in")._file_of)


def test_a_checkpoint_is_exported_without_its_ranks(tmp_path: Path):
    model = tiny()
    saved_by_transformers(model, tmp_path / "in")
    run_ranks(4, read_and_checkpoint, model, tmp_path / "in", tmp_path)
    export_checkpoint(tmp_path / "step-00000000", model, tmp_path / "out", torch.float32)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def read_and_checkpoint(model: Any, source: Path, folder: Path) -> None:
    config = layout(tp=2, pp=2, precision=Precision.FP32)
    groups = ProcessGroupManager(config, Device("cpu", "gloo"))
    engine = build_engine(config, model, groups, SafetensorsWeights(source), EngineOptions(seq=SEQ))
    save(engine, folder, DataPosition(0, 0, SEQ, ""), plan(model, 1), model)


def test_base_models_stored_without_prefix_and_wrapped_text_models_are_found(tmp_path: Path):
    save_file({"h.0.w": torch.ones(2), "model.language_model.norm.w": torch.zeros(3)}, tmp_path / "model.safetensors")
    weights = SafetensorsWeights(tmp_path)
    assert weights.read(TensorSlice("transformer.h.0.w", (2,))).tolist() == [1.0, 1.0]
    assert weights.read(TensorSlice("model.norm.w", (3,), 0, 1, 2, 3)).tolist() == [0.0]


def test_folders_that_hold_no_such_model_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="neither"):
        SafetensorsWeights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 5)
    with pytest.raises(InputError, match="not a safetensors file"):
        SafetensorsWeights(tmp_path)
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    weights = SafetensorsWeights(tmp_path)
    with pytest.raises(InputError, match="no tensor b"):
        weights.read(TensorSlice("b", (4,)))
    with pytest.raises(InputError, match=r"a is \[4\], the plan's model has \[5\]"):
        weights.read(TensorSlice("a", (5,)))


@pytest.mark.parametrize(
    "content", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../b.safetensors"}}', "[" * 90_000]
)
def test_an_index_that_is_none_or_points_elsewhere_is_refused(tmp_path: Path, content: str):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError):
        SafetensorsWeights(tmp_path)


def test_an_index_that_promises_too_much_is_refused(tmp_path: Path):
    save_file({"a": torch.ones(4)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"b": "one.safetensors", "c": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("b", "c"):
        with pytest.raises(InputError):
            SafetensorsWeights(tmp_path).read(TensorSlice(name, (4,)))
