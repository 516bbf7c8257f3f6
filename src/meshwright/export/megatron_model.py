"""A model as arguments of Megatron-LM's pretrain_gpt.py. In: a ModelSpec and its config.json. Out: words.

Families whose layers those arguments describe in full; any other is refused rather than half described.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from meshwright.export.job import refuse
from meshwright.models import ModelSpec
from meshwright.models.spec import Attention, DenseMlp, MoeMlp

LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
MIXTURES = ("mixtral", "qwen3_moe")
LATENT = ("deepseek_v3",)
KNOWN = ("gpt2", *LLAMAS, *MIXTURES, *LATENT)


def model_arguments(model: ModelSpec, values: Mapping[str, Any], seq: int) -> list[str]:
    """Shape, positions, norms, attention and MLP."""
    family = str(values.get("model_type", model.model_type))
    if family == "kimi_k2":
        family = "deepseek_v3"
    windows = any(isinstance(k.mixer, Attention) and k.mixer.window for k in model.kinds)
    if family not in KNOWN or windows:
        what = "sliding windows" if windows else f"the arguments of model type {family!r}"
        raise refuse("Megatron-LM", f"{what} are not exported", f"exported are {', '.join(KNOWN)}")
    mixer = next(kind.mixer for kind in model.kinds if isinstance(kind.mixer, Attention))
    words = [
        "--num-layers", str(model.num_layers),
        "--hidden-size", str(model.hidden),
        "--ffn-hidden-size", str(_dense_width(model)),
        "--num-attention-heads", str(mixer.heads),
        "--seq-length", str(seq),
        "--max-position-embeddings", str(max(seq, model.max_positions or 0)),
        "--vocab-size", str(model.vocab),
        "--make-vocab-size-divisible-by", "128",
    ]  # fmt: skip
    if family == "gpt2":
        words += [] if model.tied_embeddings else ["--untie-embeddings-and-output-weights"]
        return [*words, "--position-embedding-type", "learned_absolute", "--normalization", "LayerNorm"]
    words += ["--position-embedding-type", "yarn" if _yarn(values) and family not in LATENT else "rope"]
    words += ["--rotary-base", _number(_rope(values, "rope_theta", 10_000))]
    words += ["--normalization", "RMSNorm", "--norm-epsilon", str(values.get("rms_norm_eps", 1e-6))]
    words += ["--swiglu", "--disable-bias-linear"]
    words += [] if model.tied_embeddings else ["--untie-embeddings-and-output-weights"]
    if _rope(values, "rope_type", None) == "llama3":
        words += ["--use-rope-scaling", "--rope-scaling-factor", str(_rope(values, "factor", 8.0))]
    words += _latent(values) if family in LATENT else _grouped(model, mixer)
    return words + _experts(model, values) + (["--mtp-num-layers", str(model.mtp_layers)] if model.mtp_layers else [])


def _dense_width(model: ModelSpec) -> int:
    """The width of a dense layer, of the experts where all layers have them."""
    dense = [kind.mlp.width for kind in model.kinds if isinstance(kind.mlp, DenseMlp)]
    experts = [kind.mlp.width for kind in model.kinds if isinstance(kind.mlp, MoeMlp)]
    return (dense or experts)[0]


def _grouped(model: ModelSpec, mixer: Attention) -> list[str]:
    words = ["--kv-channels", str(mixer.qk_dim)]
    if mixer.kv_heads != mixer.heads:
        words += ["--group-query-attention", "--num-query-groups", str(mixer.kv_heads)]
    names = {tensor.name for kind in model.kinds for tensor in kind.tensors}
    words += ["--add-qkv-bias"] if "self_attn.q_proj.bias" in names else []
    return words + (["--qk-layernorm"] if "self_attn.q_norm.weight" in names else [])


def _latent(values: Mapping[str, Any]) -> list[str]:
    """Multi-head latent attention with its yarn-scaled positions."""
    words = ["--multi-latent-attention", "--qk-layernorm"]
    named = {"q-lora-rank": "q_lora_rank", "kv-lora-rank": "kv_lora_rank", "qk-head-dim": "qk_nope_head_dim",
             "qk-pos-emb-head-dim": "qk_rope_head_dim", "v-head-dim": "v_head_dim"}  # fmt: skip
    for option, key in named.items():
        if values.get(key) is not None:
            words += [f"--{option}", str(values[key])]
    scaling = {"rotary-scaling-factor": "factor", "mscale": "mscale", "mscale-all-dim": "mscale_all_dim"}
    for option, key in scaling.items():
        if _rope(values, key, None) is not None:
            words += [f"--{option}", str(_rope(values, key, None))]
    return words


def _experts(model: ModelSpec, values: Mapping[str, Any]) -> list[str]:
    mixtures = [kind.mlp for kind in model.kinds if isinstance(kind.mlp, MoeMlp)]
    if not mixtures:
        return []
    mlp = mixtures[0]
    words = [
        "--num-experts", str(mlp.experts), "--moe-router-topk", str(mlp.top_k), "--moe-ffn-hidden-size", str(mlp.width),
        "--moe-token-dispatcher-type", "alltoall", "--moe-grouped-gemm",
    ]  # fmt: skip
    if mlp.shared_width:
        words += ["--moe-shared-expert-intermediate-size", str(mlp.shared_width)]
    pattern = [1 if isinstance(model.kinds[k].mlp, MoeMlp) else 0 for k in model.pattern]
    if 0 in pattern:
        words += ["--moe-layer-freq", str(pattern).replace(" ", "")]
    if values.get("scoring_func") == "sigmoid":
        words += ["--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"]
    named = {"moe-router-num-groups": "n_group", "moe-router-group-topk": "topk_group",
             "moe-router-topk-scaling-factor": "routed_scaling_factor"}  # fmt: skip
    for option, key in named.items():
        if values.get(key) not in (None, 1):
            words += [f"--{option}", str(values[key])]
    return words


def _rope(values: Mapping[str, Any], key: str, default: object) -> Any:
    """A value of the rotary settings, wherever this transformers version keeps it."""
    for place in ("rope_parameters", "rope_scaling"):
        table = values.get(place)
        if isinstance(table, dict) and cast("dict[str, Any]", table).get(key) is not None:
            return cast("dict[str, Any]", table)[key]
    return values.get(key, default)


def _yarn(values: Mapping[str, Any]) -> bool:
    return "yarn" in (_rope(values, "rope_type", None), _rope(values, "type", None))


def _number(value: Any) -> str:
    return str(int(value)) if float(value).is_integer() else str(value)
