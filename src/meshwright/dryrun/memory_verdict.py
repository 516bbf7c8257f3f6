"""The predicted memory of a rank beside the traced one: state to the byte, what is alive beside it within 3 %.

In: bytes by kind as the cost model says, and a `MemoryTrace`. Out: a `MemoryDifference` for each figure that does not
agree; none if all do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshwright.dryrun.tracker import STATE, MemoryTrace
from meshwright.ledger import MemoryKind

TOLERANCE = 0.03
"""Of the peak beside state, relative to the traced one."""
SMALL_BYTES = 1 << 20
"""Differences of the peak that say nothing: counters, indices and sums of a few tokens, which no term counts. The CUDA
allocator hands memory out in pieces of twice this size."""
BESIDE_STATE = "peak beside state"


@dataclass(frozen=True)
class MemoryDifference:
    """A figure in which they differ: a kind of state, or the peak of everything else."""

    what: str
    predicted: int
    traced: int

    def __str__(self) -> str:
        line = f"{self.what}: predicted {self.predicted:,} bytes, traced {self.traced:,}"
        return f"{line} ({self.predicted / self.traced - 1.0:+.1%})" if self.traced else line


def beside_state(memory: Mapping[MemoryKind, int]) -> int:
    """Bytes that are not parameters, gradients or optimizer state."""
    return sum(nbytes for kind, nbytes in memory.items() if kind not in STATE)


def memory_differences(
    predicted: Mapping[MemoryKind, int], traced: MemoryTrace, judge_peak: bool
) -> tuple[MemoryDifference, ...]:
    """`judge_peak`: the model's program is written down allocation by allocation (else its peak is a sum of terms of
    other stacks, and is only shown)."""
    state = [(str(kind), predicted.get(kind, 0), traced.largest.get(kind, 0)) for kind in STATE]
    found = [MemoryDifference(*figures) for figures in state if figures[1] != figures[2]]
    ours, theirs = beside_state(predicted), traced.working.working_bytes
    if judge_peak and abs(ours - theirs) > max(TOLERANCE * theirs, SMALL_BYTES):
        found.append(MemoryDifference(BESIDE_STATE, ours, theirs))
    return tuple(found)
