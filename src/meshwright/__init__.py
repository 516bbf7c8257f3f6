"""meshwright: plan, prove, run and diagnose hybrid parallelism of large language models.

The public names (meshwright.api) are imported on first use: `import meshwright` is quick and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshwright.api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec(f"{__name__}.{name}"):  # a room: `from meshwright import hardware` must not load all the others
        return import_module(f"{__name__}.{name}")
    return getattr(import_module("meshwright.api"), name)
