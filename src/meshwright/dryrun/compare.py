"""The predicted ledger of a rank beside the traced one, line by line, equal to the call and the byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.cost.traffic import RankPlace, rank_ledger
from meshwright.cost.workload import Workload
from meshwright.layout.config import HybridParallelConfig
from meshwright.ledger import TrafficEntry
from meshwright.models.spec import ModelSpec

Coordinate = dict[str, int]
"""A rank's place on dp, pp, cp and tp."""


@dataclass(frozen=True)
class Difference:
    """A line that the two ledgers do not share: (calls, bytes) of each, None where one has no such line."""

    axis: str
    collective: str
    phase: str
    what: str
    group_size: int
    predicted: tuple[int, int] | None
    traced: tuple[int, int] | None

    def __str__(self) -> str:
        line = f"{self.axis} {self.collective} {self.phase} '{self.what}' over {self.group_size}"
        return f"{line}: predicted {_counts(self.predicted)}, traced {_counts(self.traced)}"


def _counts(counts: tuple[int, int] | None) -> str:
    return "nothing" if counts is None else f"{counts[0]:,} calls of {counts[1]:,} bytes in all"


def predicted_ledger(
    model: ModelSpec, workload: Workload, config: HybridParallelConfig, at: Coordinate
) -> tuple[TrafficEntry, ...]:
    """What the cost model says of the rank at a coordinate."""
    return rank_ledger(model, workload, config, at["pp"], rank_place(config, at))


def rank_place(config: HybridParallelConfig, at: Coordinate) -> RankPlace:
    """Which tp rank, and which shard of its state."""
    shard = (at["dp"] * config.cp + at["cp"]) % (config.zero_shards or config.dp * config.cp)
    return RankPlace(at["tp"], shard)


def differences(predicted: Sequence[TrafficEntry], traced: Sequence[TrafficEntry]) -> tuple[Difference, ...]:
    """Every line in which they differ; none if they agree."""
    ours, theirs = _lines(predicted), _lines(traced)
    return tuple(
        Difference(*key, predicted=ours.get(key), traced=theirs.get(key))
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    )


def _lines(entries: Sequence[TrafficEntry]) -> dict[tuple[str, str, str, str, int], tuple[int, int]]:
    return {(e.axis, str(e.collective), str(e.phase), e.what, e.group_size): (e.calls, e.total_bytes) for e in entries}
