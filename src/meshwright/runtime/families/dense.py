"""Families whose every layer has one dense MLP."""

from __future__ import annotations

from dataclasses import replace

from meshwright.runtime.families.description import Family, Product, Split, Units

LLAMA = Family(
    base="model",
    embedding="embed_tokens",
    layers="layers",
    final_norm="norm",
    attention="self_attn",
    mlp="mlp",
    products=(
        Product("self_attn.q_proj", Split.COLUMN, (Units.HEADS,)),
        Product("self_attn.k_proj", Split.COLUMN, (Units.KV_HEADS,)),
        Product("self_attn.v_proj", Split.COLUMN, (Units.KV_HEADS,)),
        Product("self_attn.o_proj", Split.ROW, (Units.HEADS,)),
        Product("mlp.gate_proj", Split.COLUMN, (Units.MLP,)),
        Product("mlp.up_proj", Split.COLUMN, (Units.MLP,)),
        Product("mlp.down_proj", Split.ROW, (Units.MLP,)),
    ),
    norms=("input_layernorm", "post_attention_layernorm"),
)
QWEN3 = replace(LLAMA, head_norms=("self_attn.q_norm", "self_attn.k_norm"), layer_mask="by layer")
_PHI3 = replace(
    LLAMA,
    products=(
        Product("self_attn.qkv_proj", Split.COLUMN, (Units.HEADS, Units.KV_HEADS, Units.KV_HEADS)),
        Product("self_attn.o_proj", Split.ROW, (Units.HEADS,)),
        Product("mlp.gate_up_proj", Split.COLUMN, (Units.MLP, Units.MLP)),
        Product("mlp.down_proj", Split.ROW, (Units.MLP,)),
    ),
    layer_mask="sliding",
    local_config_heads=True,
)
_GPT2 = Family(
    base="transformer",
    embedding="wte",
    layers="h",
    final_norm="ln_f",
    attention="attn",
    mlp="mlp",
    products=(
        Product("attn.c_attn", Split.COLUMN, (Units.HEADS, Units.HEADS, Units.HEADS), transposed=True),
        Product("attn.c_proj", Split.ROW, (Units.HEADS,), transposed=True),
        Product("mlp.c_fc", Split.COLUMN, (Units.MLP,), transposed=True),
        Product("mlp.c_proj", Split.ROW, (Units.MLP,), transposed=True),
    ),
    norms=("ln_1", "ln_2"),
    rotary=None,
    position_embedding="wpe",
    embedding_dropout="drop",
    split_size=True,
)
_GPT_NEOX = Family(
    base="gpt_neox",
    embedding="embed_in",
    layers="layers",
    final_norm="final_layer_norm",
    attention="attention",
    mlp="mlp",
    products=(
        Product("attention.query_key_value", Split.COLUMN, (Units.HEADS,)),  # interleaved head by head: one block
        Product("attention.dense", Split.ROW, (Units.HEADS,)),
        Product("mlp.dense_h_to_4h", Split.COLUMN, (Units.MLP,)),
        Product("mlp.dense_4h_to_h", Split.ROW, (Units.MLP,)),
    ),
    norms=("input_layernorm", "post_attention_layernorm"),
    embedding_dropout="emb_dropout",
)

DENSE: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": replace(LLAMA, layer_mask="sliding"),
    "qwen2": replace(LLAMA, layer_mask="by layer"),
    "qwen3": QWEN3,
    "gemma3_text": replace(
        QWEN3,
        norms=(*LLAMA.norms, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        rotary_by_layer=True,
    ),
    "phi3": _PHI3,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
}
