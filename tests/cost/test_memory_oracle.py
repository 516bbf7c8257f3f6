"""Activation memory against what autograd really saves for Hugging Face's own modules, layer by layer."""

from __future__ import annotations

from typing import Any

import pytest

from meshwright.cost.candidates import Candidates
from meshwright.cost.layers import layer_memory
from meshwright.cost.stack import stacks
from meshwright.cost.workload import Workload
from meshwright.layout.config import HybridParallelConfig, Precision
from meshwright.models.spec import ModelSpec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BATCH, SEQ = 2, 256
SIZES = {"hidden_size": 256, "num_attention_heads": 8, "vocab_size": 512, "tie_word_embeddings": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 704, "num_key_value_heads": 4},
    "qwen2": {"intermediate_size": 512, "num_key_value_heads": 2},
    "mistral": {"intermediate_size": 896, "num_key_value_heads": 8, "head_dim": 32},
}


def saved_bytes(config: Any, dtype: Any) -> int:
    """Bytes of distinct storages, other than parameters, that the decoder's forward pass saves for backward."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa")
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(input_ids=torch.randint(0, 512, (BATCH, SEQ)), use_cache=False)
    total = sum(held.values())
    del output
    return total


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_keeps_what_autograd_saves(family: str, precision: Precision) -> None:
    dtype = torch.float32 if precision is Precision.FP32 else torch.bfloat16
    few, many = (
        transformers.AutoConfig.for_model(family, num_hidden_layers=n, **SIZES, **FAMILIES[family]) for n in (1, 3)
    )
    measured = (saved_bytes(many, dtype) - saved_bytes(few, dtype)) / 2
    keys = Candidates.from_configs([HybridParallelConfig(micro_batch=BATCH, global_batch=BATCH, precision=precision)])
    spec = ModelSpec.from_config(many.to_dict())
    predicted = layer_memory(spec, Workload(seq=SEQ), keys, stacks()["meshwright"]).whole[0, 0]
    assert predicted == pytest.approx(measured, rel=0.02)
