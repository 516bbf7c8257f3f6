"""`make dryrun-memory`: the cost model's memory of the runtime beside the dry run's, by kind, over 30 layouts.

For every layout one rank of every role is traced. Parameters, gradients and optimizer state must be equal to the byte;
what is alive beside them at its peak must agree within 3 %, in the median within 1 %. Exit code 1 where it does not.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from statistics import median
from time import perf_counter

from tools.memory_matrix import MATRIX, MemoryCase

from meshwright.cost.program.own_runtime import predicted_memory
from meshwright.cost.workload import Workload
from meshwright.dryrun.compare import rank_place
from meshwright.dryrun.job import DryJob
from meshwright.dryrun.memory_verdict import TOLERANCE, beside_state
from meshwright.dryrun.proof import trace_ranks
from meshwright.dryrun.roles import distinct_ranks
from meshwright.dryrun.tracker import STATE
from meshwright.ledger import MemoryKind
from meshwright.models import ModelSpec

WORST, MEDIAN = TOLERANCE, 0.01
"""Limits of the relative difference of the peak beside state."""


@dataclass(frozen=True)
class RankMemory:
    """One rank of a layout: state by kind and the peak beside it, (predicted, traced)."""

    case: str
    stage: int
    state: dict[MemoryKind, tuple[int, int]]
    working: tuple[int, int]
    where: str

    @property
    def difference(self) -> float:
        predicted, traced = self.working
        return predicted / traced - 1.0

    @property
    def state_is_equal(self) -> bool:
        return all(predicted == traced for predicted, traced in self.state.values())


def measured(case: MemoryCase) -> list[RankMemory]:
    """Every role of a layout."""
    config = case.model_config
    spec = ModelSpec.from_config(config.to_dict())
    found: list[RankMemory] = []
    for trace in trace_ranks(DryJob(case.config, config, case.seq), distinct_ranks(spec, case.config)):
        place = rank_place(case.config, trace.coordinate)
        predicted = predicted_memory(spec, Workload(seq=case.seq), case.config, trace.coordinate["pp"], place)
        peak = trace.memory.working
        state = {kind: (predicted.get(kind, 0), trace.memory.largest.get(kind, 0)) for kind in STATE}
        where = f"{peak.action} {peak.module}".strip()
        found.append(
            RankMemory(case.name, trace.coordinate["pp"], state, (beside_state(predicted), peak.working_bytes), where)
        )
    return found


def _line(case: MemoryCase, rank: RankMemory) -> str:
    state = "  ".join(f"{'equal' if p == t else f'{p - t:+,}':>10}" for p, t in rank.state.values())
    predicted, traced = rank.working
    figures = f"{predicted / 2**20:10.1f} {traced / 2**20:10.1f} {rank.difference:+8.2%}"
    return f"{case.family:12} {rank.case:38} {rank.stage:5} {state}  {figures}  {rank.where}"


def main() -> int:
    began = perf_counter()
    kinds = "  ".join(f"{kind:>10}" for kind in STATE)
    print(f"{'family':12} {'layout':38} stage {kinds}  {'model MiB':>10} {'traced':>10} {'off by':>8}  peak at")
    ranks: list[RankMemory] = []
    for case in MATRIX:
        for rank in measured(case):
            print(_line(case, rank), flush=True)
            ranks.append(rank)
    worst = {name: max(abs(r.difference) for r in ranks if r.case == name) for name in (c.name for c in MATRIX)}
    equal = all(r.state_is_equal for r in ranks)
    found = f"median {median(worst.values()):.2%}, worst {max(worst.values()):.2%} of the peak beside state"
    state = "equal to the byte" if equal else "differs"
    print(f"{len(worst)} layouts, {len(ranks)} ranks: {found}; state {state}; {perf_counter() - began:.0f} s")
    return 0 if equal and max(worst.values()) <= WORST and median(worst.values()) <= MEDIAN else 1


if __name__ == "__main__":
    sys.exit(main())
