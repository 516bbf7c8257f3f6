"""What the doctor finds of a job that stands still: the kinds of causes, and a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Cause(StrEnum):
    """Kinds of verdicts."""

    MISSING = "missing rank"
    PLAN = "another plan"
    ORDER = "order of collectives"
    SKIPPED = "skipped collective"
    EXTRA = "extra collective"
    SIZE = "size of a collective"
    DTYPE = "dtype of a collective"
    FAILED = "error on a rank"
    DEAD = "dead process"
    STOPPED = "stopped process"
    WAITED_FOR = "rank that all wait for"
    CIRCLE = "ranks wait for one another"
    NETWORK = "messages do not arrive"
    SLOW = "slow rank"
    NOTHING = "nothing stands still"


@dataclass(frozen=True)
class Verdict:
    """`ranks`: who is to blame (for NETWORK: the ends of the link). `axis`, `action`: in what, where it is known.
    `chain`: waiting ranks down to the culprit. `details`: further sentences."""

    cause: Cause
    ranks: tuple[int, ...]
    sentence: str
    axis: str | None = None
    action: str | None = None
    group: tuple[int, ...] = ()
    behind_s: float | None = None
    chain: tuple[int, ...] = ()
    details: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        return self.cause is Cause.NOTHING
