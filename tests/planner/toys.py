"""Small models and clusters for the planner's tests: shapes only as large as a test needs."""

from __future__ import annotations

from dataclasses import replace

from meshwright.hardware.load import load as load_cluster
from meshwright.hardware.load import resize
from meshwright.hardware.spec import Cluster
from meshwright.models.from_config import spec_from_config
from meshwright.models.spec import ModelSpec


def dense(layers: int = 8, heads: int = 8, hidden: int = 1024) -> ModelSpec:
    """A Llama of `layers` layers."""
    return spec_from_config(
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 2),
            "num_hidden_layers": layers,
            "vocab_size": 32000,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
        "toy-dense",
    )


def moe(layers: int = 4, experts: int = 8) -> ModelSpec:
    """A Mixtral of `experts` experts."""
    return spec_from_config(
        {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "hidden_size": 1024,
            "intermediate_size": 2048,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "num_hidden_layers": layers,
            "num_local_experts": experts,
            "num_experts_per_tok": 2,
            "vocab_size": 32000,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
        "toy-moe",
    )


def cluster(gpus: int, memory_gib: float | None = None) -> Cluster:
    """H100 nodes of eight, or a part of one; with another memory size where given."""
    found = resize(load_cluster("h100-sxm"), gpus=gpus)
    if memory_gib is None:
        return found
    chip = replace(found.accelerator, memory_bytes=int(memory_gib * 2**30))
    return replace(found, accelerator=chip)
