"""The table of families: a config's `model_type` and the recipe that reads it."""

from __future__ import annotations

from collections.abc import Callable

from meshwright.models.families import deepseek_v4, gemma, gpt, hybrid, kin, llama, mla, moe
from meshwright.models.fields import Fields
from meshwright.models.spec import ModelSpec

Recipe = Callable[[Fields], ModelSpec]

FAMILIES: dict[str, Recipe] = {
    "llama": llama.llama,
    "mistral": llama.mistral,
    "qwen2": llama.qwen2,
    "qwen2_vl_text": llama.qwen2,
    "qwen2_5_vl_text": llama.qwen2,
    "qwen3": llama.qwen3,
    "qwen3_vl_text": llama.qwen3,
    "phi3": llama.phi3,
    "gpt2": gpt.gpt2,
    "opt": gpt.opt,
    "bloom": gpt.bloom,
    "gpt_neox": gpt.gpt_neox,
    "gptj": gpt.gptj,
    "falcon": gpt.falcon,
    "mpt": gpt.mpt,
    "nemotron": gpt.nemotron,
    "mixtral": moe.mixtral,
    "qwen2_moe": moe.qwen2_moe,
    "qwen3_moe": moe.qwen3_moe,
    "qwen3_vl_moe_text": moe.qwen3_moe,
    "gpt_oss": moe.gpt_oss,
    "glm4_moe": moe.glm4_moe,
    "minimax_m2": moe.minimax_m2,
    "llama4_text": moe.llama4,
    "mimo_v2_flash": moe.mimo_v2,
    "deepseek_v2": mla.deepseek,
    "deepseek_v3": mla.deepseek,
    "kimi_k2": mla.deepseek,
    "glm_moe_dsa": mla.glm_moe_dsa,
    "deepseek_v32": mla.glm_moe_dsa,
    "deepseek_v4": deepseek_v4.deepseek_v4,
    "glm4": llama.glm4,
    "gemma": gemma.gemma,
    "gemma2": gemma.gemma2,
    "gemma3_text": gemma.gemma3,
    "gemma4_text": gemma.gemma4,
    "minimax_m3": moe.minimax_m3,
    "minimax_m3_vl_text": moe.minimax_m3,
    "step3p7": moe.step3p7,
    "step3p5": moe.step3p7,
    "qwen3_next": hybrid.qwen3_next,
    "qwen3_5_text": hybrid.qwen3_5,
    "qwen3_5_moe_text": hybrid.qwen3_5,
    "nemotron_h": hybrid.nemotron_h,
    "kimi_linear": hybrid.kimi_linear,
    "glm4_moe_lite": mla.deepseek,
    **kin.RECIPES,
}
