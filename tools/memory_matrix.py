"""30 layouts over which the cost model's memory of the runtime is held against the dry run's traces.

Proportions of real models, a few layers of them: hidden sizes from 512, sequences of 1,024 and 2,048 tokens,
vocabularies of 32,000 and more, so that no figure is a matter of small buffers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig

from meshwright.layout.config import ContextVariant, HybridParallelConfig, Precision, Recompute, Schedule

COMMON: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "num_hidden_layers": 4,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 2816,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": LLAMA | {"sliding_window": 4096},
    "qwen3": LLAMA | {"head_dim": 128, "num_attention_heads": 8, "vocab_size": 64000, "tie_word_embeddings": True},
    "gemma3_text": LLAMA
    | {
        "vocab_size": 64000,
        "head_dim": 128,
        "num_attention_heads": 8,
        "query_pre_attn_scalar": 128,
        "sliding_window": 512,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "tie_word_embeddings": True,
    },
    "gpt2": {"vocab_size": 50304, "n_layer": 4, "n_embd": 768, "n_head": 12, "n_positions": 2048}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "mixtral": LLAMA | {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1792},
    "qwen3_moe": LLAMA
    | {"head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 512}
    | {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1},
    "deepseek_v3": LLAMA
    | {"num_key_value_heads": 16, "q_lora_rank": 384, "kv_lora_rank": 256, "qk_nope_head_dim": 64}
    | {"qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 16, "num_experts_per_tok": 4}
    | {"moe_intermediate_size": 512, "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 4, "topk_group": 2},
}
"""Sizes of each family, smaller than the real ones in the same proportions."""

SP = {"sequence_parallel": True}
FULL, SELECTIVE = ({"recompute": mode} for mode in (Recompute.FULL, Recompute.SELECTIVE))
FP32 = {"precision": Precision.FP32}
INTERLEAVED = {"schedule": Schedule.INTERLEAVED, "vpp": 2}
EXCHANGE = {"cp_variant": ContextVariant.ALL_TO_ALL}


@dataclass(frozen=True)
class MemoryCase:
    """A family with changes to its sizes, a layout, and the length of sequences."""

    name: str
    config: HybridParallelConfig
    family: str = "llama"
    model: dict[str, Any] = field(default_factory=dict)
    seq: int = 1024

    @property
    def model_config(self) -> Any:
        return AutoConfig.for_model(self.family, **(COMMON | SHAPES[self.family] | self.model))


def layout(**sizes: Any) -> HybridParallelConfig:
    """bf16, and three microbatches per rank or pp + 2, unless a global batch is given."""
    microbatches = max(3, sizes.get("pp", 1) + 2 if sizes.get("pp", 1) > 1 else 3)
    batch = microbatches * sizes.get("dp", 1) * sizes.get("micro_batch", 1)
    return HybridParallelConfig(**({"global_batch": batch, "precision": Precision.BF16} | sizes))


EIGHT = {"num_hidden_layers": 8}

MATRIX = [
    MemoryCase("one rank", layout()),
    MemoryCase("one rank, fp32, micro batch 2", layout(micro_batch=2, **FP32)),
    MemoryCase("one rank, full recompute", layout(**FULL), "mistral", EIGHT, 2048),
    MemoryCase("one rank, selective recompute", layout(**SELECTIVE), "qwen3"),
    MemoryCase("tp4", layout(tp=4), "qwen3"),
    MemoryCase("tp4 sp, micro batch 2", layout(tp=4, micro_batch=2, **SP), "llama", EIGHT),
    MemoryCase("tp2 sp", layout(tp=2, **SP), "gpt2"),
    MemoryCase("tp2 sp, full recompute", layout(tp=2, **SP, **FULL), "gemma3_text"),
    MemoryCase("tp4 x pp2, 1F1B", layout(tp=4, pp=2, **SP), "llama", EIGHT, 2048),
    MemoryCase("pp4, 1F1B", layout(pp=4), "gpt2", {"n_layer": 8}),
    MemoryCase("pp4, GPipe", layout(pp=4, schedule=Schedule.GPIPE), "llama", EIGHT),
    MemoryCase("pp2 x tp2 sp, interleaved", layout(pp=2, tp=2, **SP, **INTERLEAVED), "qwen3", EIGHT),
    MemoryCase("pp4, ZB-H1", layout(pp=4, schedule=Schedule.ZB_H1), "llama", EIGHT),
    MemoryCase("dp2 x pp2, ZBV, ZeRO-2", layout(dp=2, pp=2, vpp=2, zero=2, schedule=Schedule.ZBV), "llama", EIGHT),
    MemoryCase(
        "pp2, DualPipeV, selective recompute",
        layout(pp=2, vpp=2, schedule=Schedule.DUALPIPEV, **SELECTIVE),
        "llama",
        EIGHT,
    ),
    MemoryCase("cp2 ring", layout(cp=2), "llama", {}, 2048),
    MemoryCase("cp4 ring x tp2 sp, ZeRO-1", layout(cp=4, tp=2, zero=1, **SP), "qwen3", {}, 4096),
    MemoryCase("cp2 all-to-all, full recompute", layout(cp=2, **EXCHANGE, **FULL), "llama", EIGHT, 2048),
    MemoryCase("cp4 all-to-all x dp2, ZeRO-3", layout(cp=4, dp=2, zero=3, **EXCHANGE), "llama", {}, 4096),
    MemoryCase("dp8, ZeRO-1", layout(dp=8, zero=1), "llama", EIGHT),
    MemoryCase("dp8, ZeRO-2, micro batch 2", layout(dp=8, zero=2, micro_batch=2), "gemma3_text"),
    MemoryCase("dp8, ZeRO-3", layout(dp=8, zero=3), "llama", EIGHT),
    MemoryCase("dp4, ZeRO-3, full recompute, fp32", layout(dp=4, zero=3, **FULL, **FP32), "llama", EIGHT),
    MemoryCase("dp2 x tp2 sp x pp2, ZeRO-1", layout(dp=2, tp=2, pp=2, zero=1, **SP), "llama", EIGHT),
    MemoryCase("dp4 x pp2, ZeRO-2, tied", layout(dp=4, pp=2, zero=2), "qwen3"),
    MemoryCase("dp4 x ep4", layout(dp=4, ep=4), "mixtral"),
    MemoryCase("dp8 x ep8, ZeRO-3", layout(dp=8, ep=8, zero=3), "qwen3_moe"),
    MemoryCase("ep4 over dp2 x tp2 sp, pp2", layout(dp=2, tp=2, pp=2, ep=4, **SP), "mixtral"),
    MemoryCase("dp4 x ep4 x pp2", layout(dp=4, ep=4, pp=2), "deepseek_v3"),
    MemoryCase("ep2 x expert-tp2 x dp2, ZeRO-2", layout(dp=2, tp=2, ep=2, expert_tp=2, zero=2), "deepseek_v3"),
]
