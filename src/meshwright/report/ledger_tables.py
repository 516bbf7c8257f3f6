"""The traffic ledger as a person reads it: what was recorded beside what was predicted, line by line.

In: ledgers of ranks. Out: a rich table, and whether all lines agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from meshwright.ledger import TrafficEntry
from meshwright.report.fitted_table import table
from meshwright.report.numbers import size, whole

ROUTED = ("ep", "expert_tp")
"""Axes on which routed tokens travel."""

Line = tuple[str, str, str, str, int]
"""axis, phase, collective, what, group size"""


@dataclass(frozen=True)
class LedgerLine:
    """One line on one stage: (calls, bytes) as recorded by its ranks and as predicted; (0, 0) where it is missing."""

    stage: int
    line: Line
    recorded: tuple[int, int]
    predicted: tuple[int, int]

    @property
    def agrees(self) -> bool:
        return self.recorded == self.predicted


def compare_ledgers(
    ranks: Sequence[tuple[int, Sequence[TrafficEntry], Sequence[TrafficEntry]]],
) -> list[LedgerLine]:
    """`ranks`: stage, recorded and predicted ledger of every rank. A line on which ranks of a stage differ is shown as
    the first that disagrees with its prediction. What routed tokens send differs from rank to rank with the router's
    choice: there the mean of a stage's ranks counts, if all made as many calls."""
    found: dict[tuple[int, Line], LedgerLine] = {}
    recorded = [(stage, _by_line(entries)) for stage, entries, _ in ranks]
    for (stage, entries), (_, _, predicted) in zip(recorded, ranks, strict=True):
        own = _routed_as_means(entries, [e for s, e in recorded if s == stage])
        expected = _by_line(predicted)
        for line in own.keys() | expected.keys():
            made = LedgerLine(stage, line, own.get(line, (0, 0)), expected.get(line, (0, 0)))
            if (stage, line) not in found or (found[stage, line].agrees and not made.agrees):
                found[stage, line] = made
    return [found[key] for key in sorted(found, key=lambda k: (k[1][0], k[0], k[1]))]


def _routed_as_means(
    own: dict[Line, tuple[int, int]], ranks: Sequence[dict[Line, tuple[int, int]]]
) -> dict[Line, tuple[int, int]]:
    """One rank's lines, those of ROUTED axes with the mean bytes of all ranks of its stage."""
    means: dict[Line, tuple[int, int]] = {}
    for line, (calls, sent) in own.items():
        of_ranks = [rank.get(line, (0, 0)) for rank in ranks]
        total = sum(bytes_ for _, bytes_ in of_ranks)
        whole_mean = total % len(ranks) == 0 and all(other == calls for other, _ in of_ranks)
        means[line] = (calls, total // len(ranks)) if line[0] in ROUTED and whole_mean else (calls, sent)
    return means


def ledger_table(lines: Sequence[LedgerLine]) -> Table:
    """Axis by axis; bytes in full, because they agree to the byte."""
    made = table(
        "",
        "axis",
        "stage",
        "phase",
        "collective",
        "what",
        "ranks",
        "calls",
        "bytes",
        "",
        "predicted",
        left=5,
        text=("predicted",),
    )
    for line in lines:
        axis, phase, collective, what, ranks = line.line
        calls, total = line.recorded
        verdict = "=" if line.agrees else f"{whole(line.predicted[0])} calls, {whole(line.predicted[1])} bytes"
        cells = (axis, str(line.stage), phase, collective, what, str(ranks), whole(calls), whole(total), size(total))
        made.add_row(*cells, verdict, style=None if line.agrees else "bold red")
    return made


def _by_line(entries: Sequence[TrafficEntry]) -> dict[Line, tuple[int, int]]:
    return {(e.axis, e.phase, e.collective, e.what, e.group_size): (e.calls, e.total_bytes) for e in entries}
