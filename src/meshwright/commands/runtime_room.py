"""What commands that run a job need beside the base install: torch and transformers."""

from __future__ import annotations

from importlib.util import find_spec

from meshwright.errors import InputError


def needs_runtime(command: str) -> None:
    """An InputError that says what to install where torch or transformers is missing."""
    missing = [name for name in ("torch", "transformers", "safetensors") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"`meshwright {command}` runs a model and needs {', '.join(missing)}: pip install 'meshwright[runtime]'"
        )
