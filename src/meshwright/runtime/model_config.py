"""The transformers config of a plan's model: from the plan itself, the catalogue, or a path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from meshwright.errors import InputError
from meshwright.models.from_config import read_config
from meshwright.models.load import catalogue
from meshwright.plan import Plan
from meshwright.runtime.families import family_of

_NOT_THE_MODEL = ("architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "_name_or_path")
"""Keys of a config.json that say how it was saved, not what the model is."""


def transformers_config(plan: Plan) -> Any:
    """A config of a supported family; multimodal wrappers give their text model."""
    values = dict(plan.model.config) if plan.model.config is not None else _values_of(plan.model.name)
    return config_from_values(values, plan.model.name)


def config_from_values(values: dict[str, Any], name: str) -> Any:
    """Build and check a config from the values of a config.json."""
    inner = values.get("text_config")
    if isinstance(inner, dict):
        values = {"model_type": f"{values.get('model_type')}_text"} | inner
    if values.get("quantization_config"):
        raise InputError(f"{name}: quantised weights cannot be trained; use the unquantised model's config")
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise InputError(f"{name}: transformers does not know model type {model_type!r}")
    kept = {k: v for k, v in values.items() if k not in _NOT_THE_MODEL and k != "model_type"}
    try:
        config = CONFIG_MAPPING[model_type](**kept)
    except Exception as error:  # config classes check themselves in ways of their own, down to hub-specific errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{name}: transformers refuses this config ({reason[:200]})") from error
    family_of(config)
    return config


def _values_of(name: str) -> dict[str, Any]:
    for entry in catalogue():
        if name.lower() in {key.lower() for key in (entry.name, *entry.aliases, *entry.hub_ids)}:
            return dict(read_config(entry.config_file))
    return dict(read_config(Path(name).expanduser()))
