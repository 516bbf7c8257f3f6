"""A scored row: what was measured, what was predicted, by how much they differ."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """How the report groups rows. `architecture` is 'dense' or 'moe'; `tier` and `family` as the file names them. Rows
    of one family with the same `sweep` differ in their split alone ('': part of none)."""

    id: str
    family: str
    tier: str
    architecture: str
    sweep: str = ""


@dataclass(frozen=True)
class Pair:
    """A measured and a predicted value of one quantity."""

    measured: float
    predicted: float

    @property
    def relative_error(self) -> float:
        """Signed, as a fraction of the measured value: positive where the prediction is too high."""
        return self.predicted / self.measured - 1.0

    @property
    def ape(self) -> float:
        """Absolute error as a fraction of the measured value."""
        return abs(self.relative_error)


@dataclass(frozen=True)
class ScoredRow:
    """`rate` is tokens/s per GPU (output tokens for serving); `memory` the peak in GiB. None where not measured.

    `ran` is what happened, `fits` what was predicted; None where they say nothing (the row's own fit chose a knob).
    """

    group: Group
    rate: Pair | None
    memory: Pair | None
    ran: bool | None
    fits: bool | None
    predicted_rate: float
    predicted_gib: float
    assumed: tuple[str, ...]

    @property
    def says_anything(self) -> bool:
        return self.rate is not None or self.memory is not None or self.ran is not None


@dataclass(frozen=True)
class SkippedRow:
    id: str
    reason: str
