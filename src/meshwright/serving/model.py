"""What serving asks of a plan's model: its name for vLLM, its architecture class, heads, layers and experts.

In: a plan. Out: a frozen `ServedModel`. Numbers come from the ModelSpec, the rest from the config.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from meshwright.errors import InputError
from meshwright.layout.rules import ModelFacts
from meshwright.models.from_config import read_config
from meshwright.models.load import catalogue
from meshwright.models.spec import Attention
from meshwright.plan import Plan
from meshwright.planner.legality import model_facts


@dataclass(frozen=True)
class ServedModel:
    """`name`: what `vllm serve` is given. `architecture`: the class of config.json (None: not known). `latent`: its
    attention caches one latent for all heads (MLA)."""

    name: str
    architecture: str | None
    facts: ModelFacts
    kv_heads: int | None
    latent: bool
    quantized: bool

    @property
    def experts(self) -> int:
        return self.facts.experts or 0

    @classmethod
    def of(cls, plan: Plan) -> ServedModel:
        spec = plan.load_model()
        values, name = _config_and_name(plan)
        softmax = [k.mixer for k in spec.kinds if isinstance(k.mixer, Attention)]
        kv_heads = min((m.kv_heads for m in softmax if not m.kv_replicated), default=None)
        architectures = cast("list[Any]", values.get("architectures") or [None])
        return cls(
            name,
            None if architectures[0] is None else str(architectures[0]),
            model_facts(spec),
            kv_heads,
            latent=bool(softmax) and all(m.kv_replicated for m in softmax),
            quantized=bool(values.get("quantization_config")),
        )


def _config_and_name(plan: Plan) -> tuple[dict[str, Any], str]:
    """The values of config.json as far as they are at hand, and the model's name for vLLM."""
    name = plan.model.name
    for entry in catalogue():
        if name.lower() in {key.lower() for key in (entry.name, *entry.aliases, *entry.hub_ids)}:
            values = dict(read_config(entry.config_file))
            if entry.quantization is not None:
                values["quantization_config"] = entry.quantization
            return values, entry.hub_ids[0] if entry.hub_ids else name
    path = Path(name).expanduser()
    values = dict(plan.model.config or {})
    if not values and path.exists():
        values = dict(read_config(path))
    folder = path.parent if path.suffix == ".json" else path
    return values, str(folder) if path.exists() else name


def weights_folder(plan: Plan) -> Path | None:
    """The plan's model as a folder with safetensors, where it names one."""
    path = Path(plan.model.name).expanduser()
    folder = path.parent if path.suffix == ".json" else path
    return folder if folder.is_dir() and any(folder.glob("*.safetensors")) else None


def needs_weights(plan: Plan) -> InputError:
    return InputError(
        f"the plan's model {plan.model.name!r} is no folder with weights; give --weights FOLDER (safetensors) or "
        "--checkpoint FOLDER (of meshwright train)"
    )
