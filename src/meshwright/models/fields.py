"""Typed reading of a config.json: every value is checked for presence, type and size when it is taken.

In: a mapping of unknown content and a label for messages. Out: ints, floats, flags, lists - or an InputError of one
line that names the key. Several names may be given for one value (n_embd, hidden_size): the first present wins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from meshwright.errors import InputError, suggestion

LARGEST_SIZE = 10_000_000
"""Widths, vocabularies and the like above this are taken for mistakes (the largest published is 1,048,576 tokens)."""
LARGEST_POSITIONS = 10**12
MOST_LAYERS = 10_000


def shown(value: object) -> str:
    """A value for an error message: short, on one line."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


@dataclass(frozen=True)
class Fields:
    """The keys of one config. `label` is what messages call it."""

    values: Mapping[str, object]
    label: str

    def error(self, message: str) -> InputError:
        return InputError(f"{self.label}: {message}")

    def find(self, names: tuple[str, ...]) -> tuple[str, object]:
        """The first of `names` that is present and not null, with its value (None where there is none)."""
        for name in names:
            value = self.values.get(name)
            if value is not None:
                return name, value
        return names[0], None

    def whole(self, *names: str, least: int = 1, most: int = LARGEST_SIZE) -> int | None:
        """A whole number from `least` to `most`, or None where the key is absent or null."""
        name, value = self.find(names)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"{name} must be a whole number, got {shown(value)}")
        if not least <= value <= most:
            raise self.error(f"{name} must be from {least} to {most}, got {shown(value)}")
        return value

    def size(self, *names: str, default: int | None = None, least: int = 1, most: int = LARGEST_SIZE) -> int:
        """A whole number that must be there unless a default is given."""
        value = self.whole(*names, least=least, most=most)
        if value is None:
            value = default
        if value is None:
            near = suggestion(names[0], [k for k in self.values if k.isidentifier() and len(k) < 60], limit=1)
            raise self.error(f"{names[0]} is missing{near}")
        return value

    def number(self, *names: str, default: float = 0.0) -> float:
        """A finite number."""
        name, value = self.find(names)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(f"{name} must be a finite number, got {shown(value)}")
        return float(value)

    def flag(self, *names: str, default: bool = False) -> bool:
        name, value = self.find(names)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"{name} must be true or false, got {shown(value)}")
        return value

    def text(self, *names: str, default: str = "") -> str:
        name, value = self.find(names)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(f"{name} must be text, got {shown(value)}")
        return value

    def items(self, name: str) -> list[object] | None:
        """A list of at most MOST_LAYERS entries, or None."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.error(f"{name} must be a list, got {shown(value)}")
        entries = cast("list[object]", value)
        if len(entries) > MOST_LAYERS:
            raise self.error(f"{name} has {len(entries)} entries; at most {MOST_LAYERS} are read")
        return entries

    def texts(self, name: str) -> list[str] | None:
        entries = self.items(name)
        if entries is None:
            return None
        if not all(isinstance(entry, str) for entry in entries):
            raise self.error(f"{name} must be a list of names")
        return [str(entry) for entry in entries]

    def wholes(self, name: str, least: int = 0) -> list[int] | None:
        entries = self.items(name)
        if entries is None:
            return None
        checked: list[int] = []
        for entry in entries:
            if isinstance(entry, bool) or not isinstance(entry, int) or not least <= entry <= LARGEST_SIZE:
                raise self.error(f"{name} must be a list of whole numbers of at least {least}")
            checked.append(entry)
        return checked

    def section(self, name: str) -> Fields | None:
        """A nested object, or None."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(f"{name} must be an object, got {shown(value)}")
        shown_name = name if name.isidentifier() else shown(name)
        return Fields(cast("dict[str, object]", value), f"{self.label}: {shown_name}")

    def layers(self, *names: str) -> int:
        return self.size(*(names or ("num_hidden_layers",)), most=MOST_LAYERS)

    def per_layer(self, name: str, entries: list[str] | list[int] | None, layers: int) -> None:
        """Check that a per-layer list has one entry for each layer."""
        if entries is not None and len(entries) != layers:
            raise self.error(f"{name} has {len(entries)} entries for {layers} layers")

    def positions(self) -> int | None:
        names = ("max_position_embeddings", "n_positions", "n_ctx", "model_max_length", "seq_length")
        return self.whole(*names, most=LARGEST_POSITIONS)
