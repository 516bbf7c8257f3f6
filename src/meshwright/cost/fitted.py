"""The constants that a fit to published measurements found, kept apart from those that were assumed.

In: `data/fitted.toml`, written by `python -m tools.calibrate`. Out: values by kind (device, stack, network), owner and
field, and the evidence for each: date, rows, range.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any, cast

Values = dict[str, float]


@cache
def _file() -> dict[str, Any]:
    path = files("meshwright.cost").joinpath("data/fitted.toml")
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def fitted_values(kind: str, owner: str) -> Values:
    """Fitted fields of one device, stack or the network; a field 'attention.flash2' is an entry of a table."""
    return dict(cast(Values, _file().get(kind, {}).get(owner, {})))


def evidence(kind: str, owner: str) -> dict[str, str]:
    """What each fitted field rests on."""
    return dict(cast(dict[str, str], _file().get("evidence", {}).get(kind, {}).get(owner, {})))
