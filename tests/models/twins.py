"""Transformers' own model of a config, on the meta device: the oracle of parameter counts."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging

logging.set_verbosity_error()

Shapes = dict[str, tuple[int, ...]]

NOT_ARCHITECTURE = ("model_type", "auto_map", "quantization_config", "transformers_version", "architectures")
SAME_MODEL = {"kimi_k2": "deepseek_v3", "minimax_m3": "minimax_m3_vl_text"}
"""Model types that transformers knows under another name (Kimi-K2's config names DeepseekV3ForCausalLM itself)."""
LAYER = re.compile(r"^(.*?)\b(?:layers|h|blocks)\.(\d+)\.(.*)$")
TOWERS = ("model.visual.", "model.vision", "model.multi_modal")


def plain(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in NOT_ARCHITECTURE}


def transformers_config(config: dict[str, Any]) -> Any:
    """The config object of a config.json, wrapped where transformers has the language model only inside a wrapper."""
    family = config["model_type"]
    if family.startswith("qwen3_vl"):
        return AutoConfig.for_model(family, **plain(config))
    if family == "step3p7":
        text = AutoConfig.for_model("step3p5", **plain(config))
        return AutoConfig.for_model("step3p7", text_config=text.to_dict())
    if "text_config" in config:
        inner = {"tie_word_embeddings": config.get("tie_word_embeddings", False), **config["text_config"]}
        return AutoConfig.for_model(inner["model_type"], **plain(inner))
    return AutoConfig.for_model(SAME_MODEL.get(family, family), **plain(config))


def twin_shapes(config: dict[str, Any]) -> tuple[Shapes, list[Shapes]]:
    """Shapes of the language model's unique parameters: outside the layers, and layer by layer."""
    twin_config = transformers_config(config)
    wrapped = config["model_type"].startswith("qwen3_vl") or config["model_type"] == "step3p7"
    with torch.device("meta"):
        auto = AutoModelForImageTextToText if wrapped else AutoModelForCausalLM
        model = auto.from_config(twin_config)
    outer: Shapes = {}
    layers: dict[int, Shapes] = {}
    for name, parameter in model.named_parameters():  # tied ones are named once
        if name.startswith(TOWERS):
            continue
        bare = name.replace("model.language_model.", "model.")
        match = LAYER.match(bare)
        if match:
            layers.setdefault(int(match[2]), {})[match[3]] = tuple(parameter.shape)
        else:
            outer[bare] = tuple(parameter.shape)
    return outer, [layers[i] for i in sorted(layers)]
