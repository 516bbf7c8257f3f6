"""ModelSpec from a Hugging Face config: a dict, the path of a config.json, or the folder that holds it.

A wrapper's `text_config` is taken; an unknown model_type is an InputError that names the nearest families; quantised
checkpoints get the stored size of every tensor.
"""

from __future__ import annotations

import json
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import cast

from meshwright.errors import InputError, suggestion
from meshwright.models.families.registry import FAMILIES
from meshwright.models.fields import Fields, shown
from meshwright.models.quantization import quantised
from meshwright.models.spec import ModelSpec, MoeMlp

LARGEST_FILE_BYTES = 16 * 2**20
"""Configs are a few KB; a bigger file is not one."""

MOST_PARAMETERS = 10**15
"""More than this is taken for a mistake (and would overflow sums of 64-bit counts)."""

NO_BALANCE_LOSS = ("deepseek_v2", "deepseek_v3")
"""Families whose transformers class adds no load-balancing loss, whatever the config says."""

DTYPE_BITS = {"float64": 64, "float32": 32, "float": 32, "float16": 16, "half": 16, "bfloat16": 16, "auto": 16} | {
    "float8_e4m3fn": 8,
    "float8_e5m2": 8,
}


def spec_from_config(config: str | PathLike[str] | dict[str, object], name: str | None = None) -> ModelSpec:
    """The model that a config describes. `name` labels it (default: the folder, file or model type)."""
    if isinstance(config, str | PathLike):
        path = Path(config)
        values = read_config(path)
        beside = path / "hf_quant_config.json"
        if "quantization_config" not in values and path.is_dir() and beside.is_file():
            values["quantization_config"] = read_config(beside).get("quantization")  # Nvidia ModelOpt's own file
        return _from_values(values, name or _label(path), _one_line(path))
    return _from_values(config, name, "config")


def read_config(path: Path) -> dict[str, object]:
    """The JSON object in a config.json or in the folder that holds one."""
    try:
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"{_one_line(path)}: no such config.json")
        size = file.stat().st_size
        if size > LARGEST_FILE_BYTES:
            raise InputError(f"{_one_line(file)}: {size} bytes is too large for a config.json")
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{_one_line(path)}: cannot be read ({type(error).__name__})") from error
    if file.suffix in (".yaml", ".yml"):
        raise InputError(f"{_one_line(file)}: looks like a plan; MODEL is a catalogue name, a config.json or a hub id")
    try:
        values: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise InputError(f"{_one_line(file)}: not a JSON file ({reason})") from error
    if not isinstance(values, dict):
        raise InputError(f"{_one_line(file)}: a config must be a JSON object, got {shown(values)}")
    return cast("dict[str, object]", values)


def text_config(fields: Fields) -> Fields:
    """The language model's own config: the wrapper's `text_config` with what the wrapper states for both."""
    inner = next((s for k in ("text_config", "llm_config") if (s := fields.section(k)) is not None), None)
    if inner is None:
        return fields
    shared = ("tie_word_embeddings", "quantization_config", "dtype", "torch_dtype")
    outer = {k: fields.values[k] for k in shared if k in fields.values}
    values = {**outer, **inner.values}
    values.setdefault("model_type", fields.values.get("model_type"))
    return Fields(values, fields.label)


def _one_line(path: Path) -> str:
    """A path for a message: control characters out, the middle of a very long one left out."""
    text = "".join(c if c.isprintable() else "?" for c in str(path))
    return text if len(text) <= 200 else f"{text[:90]}...{text[-90:]}"


def _label(path: Path) -> str:
    named = path if path.name != "config.json" else path.resolve().parent
    return named.stem if named.suffix == ".json" else named.name


def _from_values(values: object, name: str | None, label: str) -> ModelSpec:
    if not isinstance(values, dict):
        raise InputError(f"{label}: a config must be a JSON object, got {shown(values)}")
    fields = text_config(Fields(cast("dict[str, object]", values), label))
    family = fields.text("model_type")
    if not family:
        raise fields.error("model_type is missing: a Hugging Face config.json names its family there")
    recipe = FAMILIES.get(family)
    if recipe is None:
        near = suggestion(family, FAMILIES) or f" (known: {', '.join(sorted(FAMILIES))})"
        raise fields.error(f"unknown model_type {shown(family)}{near}")
    spec = replace(recipe(fields), name=name or family, source=label, dtype_bits=_dtype_bits(fields))
    if fields.values.get("output_router_logits") is True and family not in NO_BALANCE_LOSS:
        routed = [kind.mlp.experts for kind in spec.kinds if isinstance(kind.mlp, MoeMlp)]
        spec = replace(spec, balanced_experts=max(routed, default=0))
    if spec.parameters > MOST_PARAMETERS:
        raise fields.error(f"its sizes make {spec.parameters:.2g} parameters; at most {MOST_PARAMETERS:.0g} are read")
    return quantised(spec, fields)


def _dtype_bits(fields: Fields) -> int:
    """Bits of the dtype that the config names (16 where it names none)."""
    name = fields.text("dtype", "torch_dtype", default="bfloat16").removeprefix("torch.")
    if name not in DTYPE_BITS:
        raise fields.error(f"unknown dtype {shown(name)}{suggestion(name[:40], DTYPE_BITS)}")
    return DTYPE_BITS[name]
