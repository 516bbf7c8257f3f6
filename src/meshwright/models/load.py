"""From what a user types to a ModelSpec: a catalogue name, a path, or a hub id.

`load` tries, in this order: catalogue name or alias, path of a config.json or of its folder, hub id ("org/name": first
among the catalogue's own, then a download through huggingface_hub where that is installed).
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from meshwright.errors import InputError, suggestion
from meshwright.models.fields import shown
from meshwright.models.from_config import spec_from_config
from meshwright.models.spec import ModelSpec

CATALOGUE_FOLDER = Path(__file__).parent / "catalogue"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class CatalogueEntry:
    """One catalogued model. `parameters_b` is the published total in 1e9 (None: none is published); `quantization`
    what the repository says in a file beside the config (Nvidia's hf_quant_config.json)."""

    name: str
    file: str
    source: str
    aliases: tuple[str, ...] = ()
    hub_ids: tuple[str, ...] = ()
    parameters_b: float | None = None
    quantization: dict[str, object] | None = None

    @property
    def config_file(self) -> Path:
        return CATALOGUE_FOLDER / self.file


@functools.cache
def catalogue() -> tuple[CatalogueEntry, ...]:
    """Every catalogued model, by name. Only the index is read, not the configs."""
    rows = cast("list[dict[str, Any]]", tomllib.loads((CATALOGUE_FOLDER / "index.toml").read_text("utf-8"))["model"])
    return tuple(
        CatalogueEntry(
            row["name"],
            row["file"],
            row["source"],
            tuple(row.get("aliases", ())),
            tuple(row.get("hub_ids", ())),
            row.get("parameters_b"),
            row.get("quantization"),
        )
        for row in rows
    )


def _entries_by_key() -> dict[str, CatalogueEntry]:
    return {key.lower(): e for e in catalogue() for key in (e.name, *e.aliases, *e.hub_ids)}


def _from_catalogue(entry: CatalogueEntry) -> ModelSpec:
    config = cast("dict[str, object]", json.loads(entry.config_file.read_text("utf-8")))
    if entry.quantization is not None:
        config["quantization_config"] = entry.quantization
    return spec_from_config(config, entry.name)


def load(model: str | Path) -> ModelSpec:
    """The model of a catalogue name or alias, a path to a config.json or its folder, or a hub id "org/name"."""
    text = str(model).strip()
    if not text:
        raise InputError("the model's name is empty; give a catalogue name, a path to a config.json or a hub id")
    entry = _entries_by_key().get(text.lower()) if isinstance(model, str) else None
    if entry is not None and ("/" not in text or not _exists(text)):
        return _from_catalogue(entry)
    if isinstance(model, Path) or _exists(text) or text.endswith(".json"):
        return spec_from_config(Path(text).expanduser())
    if HUB_ID.fullmatch(text):
        return spec_from_config(_download(text), text)
    names = [key for key in _entries_by_key() if "/" not in key]
    near = suggestion(text[:80], names) or "; `meshwright models` lists the catalogue"
    raise InputError(f"unknown model {shown(text)}{near}")


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, or no such user's home
        return False


def _download(hub_id: str) -> Path:
    """The config.json of a hub repository, fetched into huggingface_hub's own cache."""
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise InputError(
            f"{hub_id} is not in the catalogue and huggingface_hub is not installed; "
            "pip install huggingface_hub, or download its config.json and give the path"
        ) from error
    try:
        return Path(hub.hf_hub_download(hub_id, "config.json"))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise InputError(
            f"{hub_id}: config.json could not be downloaded ({type(error).__name__}: {reason[:120]}); "
            "give a path to the config.json instead"
        ) from error
