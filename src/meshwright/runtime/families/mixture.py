"""Families with routed experts, in all layers or in some."""

from __future__ import annotations

from dataclasses import replace

from meshwright.runtime.families.dense import LLAMA, QWEN3
from meshwright.runtime.families.description import Experts, Family, Product, Split, Units


def _mlp(path: str) -> tuple[Product, ...]:
    return (
        Product(f"{path}.gate_proj", Split.COLUMN, (Units.MLP,)),
        Product(f"{path}.up_proj", Split.COLUMN, (Units.MLP,)),
        Product(f"{path}.down_proj", Split.ROW, (Units.MLP,)),
    )


_DEEPSEEK = replace(
    LLAMA,
    products=(
        Product("self_attn.q_proj", Split.COLUMN, (Units.HEADS,)),  # where queries are not compressed
        Product("self_attn.q_b_proj", Split.COLUMN, (Units.HEADS,)),
        Product("self_attn.kv_b_proj", Split.COLUMN, (Units.HEADS,)),
        Product("self_attn.o_proj", Split.ROW, (Units.HEADS,)),
        *_mlp("mlp"),
        *_mlp("mlp.shared_experts"),
    ),
    head_norms=(
        "self_attn.q_a_proj",
        "self_attn.q_a_layernorm",
        "self_attn.kv_a_proj_with_mqa",
        "self_attn.kv_a_layernorm",
    ),
    moe=Experts(shared="mlp.shared_experts", count="n_routed_experts"),
)

MIXTURES: dict[str, Family] = {
    "mixtral": replace(LLAMA, layer_mask="sliding", moe=Experts(count="num_local_experts")),
    "qwen2_moe": replace(
        LLAMA,
        products=(*LLAMA.products, *_mlp("mlp.shared_expert")),
        norms=(*LLAMA.norms, "mlp.shared_expert_gate"),
        layer_mask="by layer",
        moe=Experts(shared="mlp.shared_expert"),
    ),
    "qwen3_moe": replace(QWEN3, layer_mask="sliding", moe=Experts()),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "gpt_oss": replace(
        LLAMA,
        layer_mask="by layer",
        moe=Experts(router="mlp.router", count="num_local_experts"),
        vectors=(("self_attn.sinks", Units.HEADS),),
        attention_function="eager",
    ),
}
