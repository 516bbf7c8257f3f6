"""How each decoder family of transformers is taken apart: where its parts are and how its products split over tp.

A `Family` is data (`description`); `dense` and `mixture` hold the tables. A model that is not described, or that has a
part the description does not know, is refused with the name of that part.
"""

from __future__ import annotations

from typing import Any

from meshwright.errors import InputError, suggestion
from meshwright.runtime.families.dense import DENSE
from meshwright.runtime.families.description import (
    Experts,
    Family,
    Product,
    Split,
    Units,
    expert_count,
    unit_count,
)
from meshwright.runtime.families.mixture import MIXTURES

__all__ = [
    "Experts",
    "Family",
    "Product",
    "Split",
    "Units",
    "expert_count",
    "family_of",
    "supported_model_types",
    "unit_count",
]

_FAMILIES: dict[str, Family] = DENSE | MIXTURES


def supported_model_types() -> tuple[str, ...]:
    return tuple(sorted(_FAMILIES))


def family_of(config: Any) -> Family:
    """The family of a transformers config, or an InputError that names what is not known about it."""
    model_type = str(config.model_type)
    if model_type not in _FAMILIES:
        raise InputError(
            f"model type '{model_type}' cannot be run: how its layers split is not described"
            f"{suggestion(model_type, _FAMILIES)}; known are {', '.join(supported_model_types())}"
        )
    unknown = {
        "add_cross_attention": "cross-attention layers",
        "use_bidirectional_attention": "bidirectional attention",
        "router_jitter_noise": "routers with noise",
    }
    if _FAMILIES[model_type].moe is None:
        unknown["num_experts"] = "routed experts"
    for attribute, part in unknown.items():
        if getattr(config, attribute, None):
            raise InputError(f"model type '{model_type}' with {attribute} set cannot be run: {part} are not described")
    return _FAMILIES[model_type]
