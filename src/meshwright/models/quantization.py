"""Stored bits of every tensor of a quantised checkpoint, from the config's `quantization_config`.

In: a ModelSpec and the quantization_config object. Out: the same ModelSpec with `bits` on the tensors that the
checkpoint quantises - element and its share of the scales - and their mean as `weight_bits`. Only weights of linear
layers and experts are quantised; embedding, norms, routers, convolutions and ignored modules keep the model's dtype.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from meshwright.models.fields import Fields, shown
from meshwright.models.spec import LayerKind, ModelSpec, Part, TensorSpec

QUANTISED_PARTS = (Part.ATTENTION, Part.MLP, Part.SHARED_EXPERT, Part.EXPERT)
LONGEST_PATTERN = 500
IGNORE_KEYS = (
    "ignore",
    "modules_to_not_convert",
    "ignored_layers",
    "exclude_modules",
    "exclude",
    "llm_int8_skip_modules",
)

SCALE_BITS = {"fp8": 32.0, "awq": 16.0, "gptq": 16.0}
"""One scale per block or group: fp32 for fp8 blocks (DeepSeek-V3's `weight_scale_inv`), fp16 for AWQ and GPTQ."""

FORMAT_BITS = {"mxfp4": 4.25, "nvfp4": 4.5, "mxfp8": 8.25}
"""4 or 8 bits with an 8-bit scale per 32 elements (OCP Microscaling v1.0) or per 16 (NVFP4)."""

Ignored = Callable[[str], bool]


def quantised(spec: ModelSpec, fields: Fields) -> ModelSpec:
    """The model with stored bits as the config's `quantization_config` says, or unchanged without one."""
    section = fields.section("quantization_config")
    if section is None:
        return spec
    method = section.text("quant_method")
    if not method:
        method = "modelopt" if section.text("quant_algo") else "unknown"
    bits = element_bits(section, method)
    expert_bits = bits
    named = fields.text("expert_dtype") or section.text("expert_dtype")
    if named:
        expert_bits = {"fp4": FORMAT_BITS["mxfp4"], "fp8": 8.0}.get(named)
        if expert_bits is None:
            raise section.error(f"unknown expert_dtype {shown(named)}; use fp4 or fp8")
    ignored = ignore_rule(section)
    only_experts = method == "mxfp4"  # gpt-oss: the other linears are listed as not converted

    def stored(tensor: TensorSpec) -> TensorSpec:
        matrix = len(tensor.shape) == 2 or tensor.experts > 0
        if tensor.part not in QUANTISED_PARTS or not matrix or tensor.name.endswith("bias"):
            return tensor
        if only_experts and tensor.part is not Part.EXPERT:
            return tensor
        if ignored(f"model.layers.0.{tensor.name}"):
            return tensor
        return replace(tensor, bits=expert_bits if tensor.part is Part.EXPERT else bits)

    def stored_kind(kind: LayerKind) -> LayerKind:
        return replace(kind, tensors=tuple(stored(t) for t in kind.tensors))

    kinds = tuple(stored_kind(kind) for kind in spec.kinds)
    mtp = tuple(stored(t) for t in spec.mtp_tensors)
    mtp_kind = stored_kind(spec.mtp_kind) if spec.mtp_kind else None
    return replace(spec, kinds=kinds, mtp_tensors=mtp, mtp_kind=mtp_kind, weight_bits=mean_bits(spec, kinds))


def mean_bits(spec: ModelSpec, kinds: tuple[LayerKind, ...]) -> float | None:
    """Mean stored bits over the quantised tensors of the layers."""
    elements = total = 0.0
    for count, kind in zip(spec.layer_counts(0, spec.num_layers), kinds, strict=True):
        for tensor in kind.tensors:
            if tensor.bits is not None:
                elements += count * tensor.size
                total += count * tensor.size * tensor.bits
    return total / elements if elements else None


def element_bits(section: Fields, method: str) -> float:
    """Stored bits of a quantised element, scales included."""
    if method == "fp8":
        block = section.wholes("weight_block_size", least=1)
        return 8.0 + (SCALE_BITS["fp8"] / (block[0] * block[1]) if block and len(block) == 2 else 0.0)
    if method in FORMAT_BITS:
        return FORMAT_BITS[method]
    if method in ("awq", "gptq", "auto-round", "autoround"):
        group = section.size("group_size", "q_group_size", default=128)
        bits = section.size("bits", "w_bit", most=16)
        zero_points = bits if section.flag("zero_point") or not section.flag("sym") else 0
        return bits + (SCALE_BITS["awq"] + zero_points) / group
    if method == "bitsandbytes":
        if section.flag("load_in_8bit", "_load_in_8bit"):
            return 8.0
        return 4.0 + 32.0 / 64.0  # one fp32 scale per 64 elements (QLoRA, arXiv 2305.14314, section 2)
    if method.startswith("modelopt"):
        return modelopt_bits(section)
    if method == "quark":
        return quark_bits(section)
    if method == "compressed-tensors":
        return compressed_tensors_bits(section)
    if method == "fbgemm_fp8":
        return 8.0
    known = "fp8, mxfp4, nvfp4, awq, gptq, bitsandbytes, modelopt, quark, compressed-tensors, fbgemm_fp8"
    raise section.error(f"unknown quant_method {shown(method)}; known: {known}")


def modelopt_bits(section: Fields) -> float:
    """Nvidia ModelOpt: the algorithm's name, or the weights' bits and group size of its config group."""
    algorithm = section.text("quant_algo").upper()
    if "NVFP4" in algorithm:
        return FORMAT_BITS["nvfp4"]
    if "MXFP8" in algorithm:
        return FORMAT_BITS["mxfp8"]
    if "FP8" in algorithm:
        return 8.0
    if "W4A16" in algorithm:
        return 4.0 + 16.0 / section.size("group_size", default=128)
    raise section.error(f"unknown quant_algo {shown(algorithm)}; known: FP8, NVFP4, MXFP8, W4A16_AWQ")


def quark_bits(section: Fields) -> float:
    """AMD Quark: the number format of the weights, fp4 in groups of 32 with an 8-bit scale (MXFP4)."""
    overall = section.section("global_quant_config")
    weight = overall.section("weight") if overall else None
    if weight is None:
        raise section.error("global_quant_config.weight is missing")
    name = weight.text("dtype")
    formats = {"fp8_e4m3": 8.0, "fp4": FORMAT_BITS["mxfp4"], "int8": 8.0, "int4": 4.0, "uint4": 4.0}
    if name not in formats:
        raise section.error(f"unknown weight dtype {shown(name)}; known: {', '.join(formats)}")
    return formats[name]


def compressed_tensors_bits(section: Fields) -> float:
    """The weights of the config groups (the widest, where several differ)."""
    groups = section.section("config_groups")
    if groups is None:
        raise section.error("config_groups is missing")
    found: list[float] = []
    for name in groups.values:
        group = groups.section(name)
        weights = group.section("weights") if group else None
        if weights is None:
            continue
        bits, size = weights.size("num_bits", most=32), weights.whole("group_size")
        scale = 8.0 if bits == 4 and weights.text("type") == "float" else 16.0
        found.append(bits + (scale / size if size else 0.0))
    if not found:
        raise section.error("config_groups name no quantised weights")
    return max(found)


def ignore_rule(section: Fields) -> Ignored:
    """Whether a module is left as it was: names, globs and 're:' patterns under the keys that the methods use."""
    patterns: list[str] = []
    for key in IGNORE_KEYS:
        patterns += section.texts(key) or []
    too_long = next((p for p in patterns if len(p) > LONGEST_PATTERN), None)
    if too_long is not None:
        raise section.error(f"an ignore pattern has {len(too_long)} characters; at most {LONGEST_PATTERN} are read")
    tests = [_pattern_test(section, pattern) for pattern in dict.fromkeys(patterns)]
    return lambda name: any(test(name) for test in tests)


def _pattern_test(section: Fields, pattern: str) -> Ignored:
    if pattern.startswith("re:"):
        return _regex_test(section, pattern[3:])
    if "*" in pattern:
        return lambda name: fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
    # A concrete layer's module stands for every layer of its kind; a bare name for a component anywhere.
    relative = re.sub(r"^(.*\.)?layers\.\d+\.", "model.layers.0.", pattern)
    return lambda name: f".{relative}." in f".{name}."


def _regex_test(section: Fields, pattern: str) -> Ignored:
    """Patterns are cut into the literal pieces between '.*': a full regular expression from a config could be made to
    run for ever."""
    pieces = [_alternatives(section, piece) for piece in pattern.removesuffix("$").split(".*")]
    return lambda name: _in_order(name, pieces)


def _alternatives(section: Fields, piece: str) -> tuple[str, ...]:
    """The literal strings that a piece such as 'mlp\\.(gate|up)_proj' stands for."""
    text = piece.removeprefix("^").replace("\\.", ".").replace("[.]", ".").replace("\\d+", "0")
    match = re.fullmatch(r"([^()|]*)\(([^()]*)\)([^()|]*)", text)
    choices = [text] if match is None else [f"{match[1]}{c}{match[3]}" for c in match[2].split("|")]
    if any(set(choice) & set("()[]{}|+?*\\") for choice in choices):
        raise section.error(f"ignore pattern {piece[:60]!r} is too involved; use names, '.*' and one (a|b) group")
    return tuple(choices)


def _in_order(name: str, pieces: Iterable[tuple[str, ...]]) -> bool:
    position = 0
    for choices in pieces:
        ends = [name.find(c, position) + len(c) for c in choices if name.find(c, position) >= 0]
        if not ends:
            return False
        position = min(ends)
    return True
