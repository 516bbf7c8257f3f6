"""What vLLM refuses, or would fail at only after minutes of loading: said before anything is started, with the reason.

In: the split, the model's facts, ranks of decode context parallelism. Out: nothing, or an InputError in one line.
Rules and list are those of vLLM 0.32; `make test-serving` asks vLLM's own registry about the list.
"""

from __future__ import annotations

from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig, Precision
from meshwright.layout.rules import divisors
from meshwright.serving.model import ServedModel

WITHOUT_PIPELINE = frozenset(
    {
        "Gemma3nForCausalLM",
        "Gemma3nForConditionalGeneration",
        "HrmTextForCausalLM",
        "IQuestLoopCoderForCausalLM",
        "Mamba2ForCausalLM",
        "Zamba2ForCausalLM",
    }
)
"""Decoders whose class in vLLM has no `SupportsPP`."""


def refuse(config: HybridParallelConfig, model: ServedModel, decode_context: int = 1) -> None:
    """Raise an InputError for the first rule that the split breaks."""
    for problem in (_heads(config, model), _pipeline(config, model), _formats(config, model)):
        if problem:
            raise InputError(problem)
    problem = _decode_context(config.tp, model, decode_context)
    if problem:
        raise InputError(problem)
    if config.cp > 1:
        raise InputError(f"cp={config.cp}: serving splits no sequence of a prompt; plan cp=1")


def _heads(config: HybridParallelConfig, model: ServedModel) -> str | None:
    tp, heads, kv_heads = config.tp, model.facts.heads, model.kv_heads
    if heads and heads % tp:
        sizes = ", ".join(str(d) for d in divisors(heads))
        return f"vLLM refuses tp={tp}: {heads} attention heads are not divisible by it; use one of {sizes}"
    if kv_heads and kv_heads % tp and tp % kv_heads:
        return (
            f"tp={tp} neither divides {kv_heads} KV heads nor is a multiple of them: vLLM fails at this while it "
            "builds the model"
        )
    width = model.facts.mlp_width
    if width and width % tp:
        return f"tp={tp} does not divide {width} MLP columns: vLLM fails at this while it builds the model"
    return None


def _pipeline(config: HybridParallelConfig, model: ServedModel) -> str | None:
    pp, layers = config.pp, model.facts.layers or 0
    if pp > layers:
        return (
            f"pp={pp} is more than {layers} layers: vLLM's own validation lets it pass and a stage without layers "
            f"fails after loading; use pp up to {layers}"
        )
    if pp > 1 and model.architecture in WITHOUT_PIPELINE:
        return f"vLLM has no pipeline parallelism for {model.architecture}; use pp=1 and a larger tp"
    if config.layer_split is not None and config.vpp == 1:
        return "vLLM takes a layer split from VLLM_PP_LAYER_PARTITION only; plan without layer_split"
    return None


def _formats(config: HybridParallelConfig, model: ServedModel) -> str | None:
    if config.precision in (Precision.MXFP8, Precision.NVFP4) and not model.quantized:
        return (
            f"precision {config.precision} needs a checkpoint that was quantised so: vLLM reads the format from its "
            "config.json, and this model's has none"
        )
    return None


def _decode_context(tp: int, model: ServedModel, size: int) -> str | None:
    if size == 1:
        return None
    if tp % size:
        return f"decode context parallelism {size} does not divide tp={tp}: it takes its ranks from the tp group"
    if model.latent or not model.kv_heads:
        return None
    if tp <= model.kv_heads:
        return (
            f"decode context parallelism shares copies of a KV head, and tp={tp} makes none of {model.kv_heads} heads; "
            f"use tp above {model.kv_heads}, or no decode context parallelism"
        )
    copies = tp // model.kv_heads
    if size > copies:
        return f"decode context parallelism {size} exceeds the {copies} copies of a KV head at tp={tp}"
    queries = (model.facts.heads or 0) // model.kv_heads
    if queries % size:
        return f"decode context parallelism {size} does not divide the {queries} query heads of each KV head"
    return None
