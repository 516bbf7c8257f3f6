"""What the user fixed before the search: for every axis and knob, the values it may take (None: all that are legal)."""

from __future__ import annotations

from dataclasses import dataclass, fields

from meshwright.errors import InputError
from meshwright.layout.config import Precision, Recompute, Schedule

COUNTS = ("tp", "pp", "cp", "dp", "ep", "expert_tp", "vpp", "micro_batch", "zero_shards", "recompute_every")


@dataclass(frozen=True)
class Constraints:
    """Allowed values by axis and knob; `Constraints(tp=(8,), zero=(0, 1))` fixes tp and keeps ZeRO at most 1."""

    tp: tuple[int, ...] | None = None
    pp: tuple[int, ...] | None = None
    cp: tuple[int, ...] | None = None
    dp: tuple[int, ...] | None = None
    ep: tuple[int, ...] | None = None
    expert_tp: tuple[int, ...] | None = None
    vpp: tuple[int, ...] | None = None
    micro_batch: tuple[int, ...] | None = None
    zero: tuple[int, ...] | None = None
    zero_shards: tuple[int, ...] | None = None
    recompute: tuple[Recompute, ...] | None = None
    recompute_every: tuple[int, ...] | None = None
    schedule: tuple[Schedule, ...] | None = None
    sequence_parallel: tuple[bool, ...] | None = None
    precision: Precision = Precision.BF16
    runs: tuple[Schedule, ...] | None = None  # the schedules that the software has, where the user fixes none

    def __post_init__(self) -> None:
        for name in COUNTS:
            for value in getattr(self, name) or ():
                if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**24:
                    raise InputError(f"{name}={value!r} is not a size; give a whole number from 1")
        for value in self.zero or ():
            if value not in (0, 1, 2, 3):
                raise InputError(f"zero={value!r} is not a ZeRO stage; try 0, 1, 2 or 3")
        for field in fields(self):
            if getattr(self, field.name) == ():
                raise InputError(f"{field.name} allows no value; leave it out to search all of them")

    def values(self, name: str, default: list[int]) -> list[int]:
        """What the user allows, or `default` where they fixed nothing."""
        allowed = getattr(self, name)
        return default if allowed is None else list(allowed)

    @property
    def fixed(self) -> dict[str, tuple[object, ...]]:
        """The knobs that the user fixed, and to what."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("precision", "runs")}
        return {name: value for name, value in named.items() if value is not None}
