"""The first call in which members of a group disagree, and which of them is wrong.

Members of a group must make the same calls in the same order. Where two differ at one sequence number, the majority is
right; among two, the one that does what it did in the step before, or what other groups of the axis do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.doctor.hang.evidence import COMPARED, COMPARED_MESSAGE, MULTIPLIER, SEND, Evidence, signature
from meshwright.flight.layout import COLLECTIVES


@dataclass(frozen=True)
class Mismatch:
    """`culprit` called `called` where `witness` called `expected` (rows of the evidence). `kind`: 'dtype', 'size',
    'skipped', 'extra', or 'order': the calls are swapped, or (where the culprit blocks in the wrong one, so that what
    it would call next is not known) the expected one may be left out."""

    kind: str
    group: int
    sequence: int
    culprit: int
    witness: int
    called: int
    expected: int
    certain: bool  # more than a guess between two ranks


@dataclass(frozen=True)
class _Cell:
    """The rows of one call: same group, same sequence number."""

    group: int
    sequence: int
    rows: NDArray[np.int64]


def first_mismatch(evidence: Evidence) -> Mismatch | None:
    """The disagreement that came first in time, in any group, or None."""
    signatures = signature(evidence.calls, COMPARED)
    cell = _first_cell(evidence, signatures)
    if cell is None:
        return _message_mismatch(evidence)
    culprit, witness, certain = _blame(evidence, signatures, cell)
    return _classified(evidence, signatures, cell, culprit, witness, certain)


def _first_cell(evidence: Evidence, signatures: NDArray[np.uint64]) -> _Cell | None:
    rows = np.flatnonzero(evidence.collective)
    if not len(rows):
        return None
    order = rows[np.lexsort((evidence.calls["sequence"][rows], evidence.group[rows]))]
    group, sequence, sign = evidence.group[order], evidence.calls["sequence"][order], signatures[order]
    starts = np.flatnonzero(np.r_[True, (group[1:] != group[:-1]) | (sequence[1:] != sequence[:-1])])
    differs = np.minimum.reduceat(sign, starts) != np.maximum.reduceat(sign, starts)
    if not differs.any():
        return None
    issued = np.minimum.reduceat(evidence.calls["issued_ns"][order], starts)
    # the first of each group, then the earliest of those: later ones follow from it
    bad = np.flatnonzero(differs)
    firsts = bad[np.unique(group[starts[bad]], return_index=True)[1]]
    chosen = int(firsts[np.argmin(issued[firsts])])
    stop = starts[chosen + 1] if chosen + 1 < len(starts) else len(order)
    members = order[starts[chosen] : stop]
    return _Cell(int(group[starts[chosen]]), int(sequence[starts[chosen]]), members)


def _blame(evidence: Evidence, signatures: NDArray[np.uint64], cell: _Cell) -> tuple[int, int, bool]:
    """(row of the culprit, row of a witness, whether that is more than a guess)."""
    values, counts = np.unique(signatures[cell.rows], return_counts=True)
    if counts.max() * 2 > len(cell.rows):
        right = values[counts.argmax()]
        wrong = cell.rows[signatures[cell.rows] != right]
        return int(wrong[0]), int(cell.rows[signatures[cell.rows] == right][0]), True
    for judge in (_as_in_the_step_before, _as_other_groups):
        right_rows = judge(evidence, signatures, cell)
        wrong = np.setdiff1d(cell.rows, right_rows)
        if len(right_rows) and len(wrong):
            return int(wrong[0]), int(right_rows[0]), True
    # whose call the other makes one later has left one out
    for late, early in ((cell.rows[0], cell.rows[-1]), (cell.rows[-1], cell.rows[0])):
        if _shifted(evidence, signatures, int(late), 1) == int(signatures[early]):
            return int(early), int(late), False
    return int(cell.rows[-1]), int(cell.rows[0]), False


def _as_in_the_step_before(evidence: Evidence, signatures: NDArray[np.uint64], cell: _Cell) -> NDArray[np.int64]:
    """Rows whose call their own rank made at the same place of the step before."""
    same: list[int] = []
    for row in cell.rows.tolist():
        own = _calls_of(evidence, row)
        steps = evidence.calls["step"][own]
        step = int(evidence.calls["step"][row])
        now, before = own[steps == step], own[steps == step - 1]
        complete = (len(own) and int(evidence.calls["sequence"][own[0]]) == 1) or bool((steps < step - 1).any())
        place = int(np.flatnonzero(now == row)[0])
        if step > 0 and complete and place < len(before) and signatures[before[place]] == signatures[row]:
            same.append(row)
    return np.asarray(same, np.int64)


def _as_other_groups(evidence: Evidence, signatures: NDArray[np.uint64], cell: _Cell) -> NDArray[np.int64]:
    """Rows whose call other groups of the axis made at the same sequence number, and the other side's did not."""
    axis = evidence.groups[cell.group].axis
    siblings = [i for i, g in enumerate(evidence.groups) if g.axis == axis and i != cell.group]
    rows = np.isin(evidence.group, siblings) & (evidence.calls["sequence"] == cell.sequence) & evidence.collective
    votes = [int((signatures[rows] == s).sum()) for s in signatures[cell.rows]]
    most = max(votes)
    if not most or votes.count(most) == len(votes):
        return np.empty(0, np.int64)
    return cell.rows[np.asarray(votes) == most]


def _calls_of(evidence: Evidence, row: int) -> NDArray[np.int64]:
    """Rows of the same rank in the same group, in order."""
    mine = (evidence.rank == evidence.rank[row]) & (evidence.group == evidence.group[row]) & evidence.collective
    return np.flatnonzero(mine)


def _shifted(evidence: Evidence, signatures: NDArray[np.uint64], row: int, by: int) -> int | None:
    """The signature of the call that the same rank made `by` later in the group."""
    own = _calls_of(evidence, row)
    at = np.flatnonzero(evidence.calls["sequence"][own] == evidence.calls["sequence"][row] + by)
    return int(signatures[own[at[0]]]) if len(at) else None


def first_deviation(evidence: Evidence, ranks: Sequence[int]) -> tuple[int, int] | None:
    """(called, due): the earliest call, over the calls of all groups, in which one of the ranks left the order that it
    kept in the step before, or None. For ranks that wait in a circle without having disagreed in any group."""
    signatures = signature(evidence.calls, COMPARED) ^ (evidence.group.astype(np.uint64) * MULTIPLIER)
    found = [pair for rank in ranks if (pair := _deviation(evidence, signatures, rank)) is not None]
    return min(found, key=lambda pair: int(evidence.calls["issued_ns"][pair[0]]), default=None)


def _deviation(evidence: Evidence, signatures: NDArray[np.uint64], rank: int) -> tuple[int, int] | None:
    """(called, due) where one rank first left the order of its step before; a step that has ended may also be too
    short: the call that followed it was called instead."""
    own = np.flatnonzero(evidence.rank == rank)
    steps = evidence.calls["step"][own]
    for step in np.unique(steps)[1:]:
        now, before = own[steps == step], own[steps == step - 1]
        whole = int(evidence.calls["serial"][own[0]]) == 1 or bool((steps < step - 1).any())
        if not whole or not len(before):
            continue
        both = min(len(now), len(before))
        differs = np.flatnonzero(signatures[now[:both]] != signatures[before[:both]])
        if len(differs):
            return int(now[differs[0]]), int(before[differs[0]])
        after = own[steps > step]
        if len(after) and len(now) < len(before):
            return int(after[0]), int(before[both])
    return None


def _classified(
    evidence: Evidence, signatures: NDArray[np.uint64], cell: _Cell, culprit: int, witness: int, certain: bool
) -> Mismatch:
    called, expected = evidence.calls[culprit], evidence.calls[witness]
    if _equal_but(called, expected, ("dtype", "bytes")) and called["dtype"] != expected["dtype"]:
        kind = "dtype"
    elif _equal_but(called, expected, ("bytes",)):
        kind = "size"
    else:
        next_called = _shifted(evidence, signatures, culprit, 1)
        next_expected = _shifted(evidence, signatures, witness, 1)
        if next_called is None:
            kind = "order"
        elif next_called == int(signatures[witness]):
            kind = "order" if next_expected in (None, int(signatures[culprit])) else "extra"
        else:
            kind = "skipped"
    ranks = int(evidence.rank[culprit]), int(evidence.rank[witness])
    return Mismatch(kind, cell.group, cell.sequence, *ranks, culprit, witness, certain)


def _equal_but(a: Any, b: Any, fields: tuple[str, ...]) -> bool:
    return all(a[name] == b[name] for name in COMPARED if name not in fields)


def _message_mismatch(evidence: Evidence) -> Mismatch | None:
    """The first message whose two ends differ in size, type or microbatch."""
    rows = np.flatnonzero(~evidence.collective)
    if not len(rows):
        return None
    calls = evidence.calls[rows]
    sent = calls["collective"] == COLLECTIVES.index(SEND)
    source = np.where(sent, evidence.rank[rows], calls["peer"])
    target = np.where(sent, calls["peer"], evidence.rank[rows])
    order = np.lexsort((calls["sequence"], target, source, evidence.group[rows]))
    keys = np.stack([evidence.group[rows], source, target, calls["sequence"].astype(np.int64)])[:, order]
    pair = np.flatnonzero((keys[:, 1:] == keys[:, :-1]).all(axis=0))
    signs = signature(calls, COMPARED_MESSAGE)[order]
    bad = pair[signs[pair] != signs[pair + 1]]
    if not len(bad):
        return None
    first = bad[np.argmin(calls["issued_ns"][order[bad]])]
    a, b = int(rows[order[first]]), int(rows[order[first + 1]])
    culprit, witness = (a, b) if _deviates(evidence, a) or not _deviates(evidence, b) else (b, a)
    certain = _deviates(evidence, culprit) and not _deviates(evidence, witness)
    one, other = evidence.calls[culprit], evidence.calls[witness]
    kind = "dtype" if one["dtype"] != other["dtype"] else "size" if one["bytes"] != other["bytes"] else "order"
    ranks = int(evidence.rank[culprit]), int(evidence.rank[witness])
    return Mismatch(kind, int(evidence.group[culprit]), int(one["sequence"]), *ranks, culprit, witness, certain)


def _deviates(evidence: Evidence, row: int) -> bool:
    """Whether a message is not what the same rank sent or received at this place of the step before."""
    call = evidence.calls[row]
    same = (evidence.rank == evidence.rank[row]) & (evidence.group == evidence.group[row])
    own = np.flatnonzero(
        same & (evidence.calls["peer"] == call["peer"]) & (evidence.calls["collective"] == call["collective"])
    )
    now = own[evidence.calls["step"][own] == call["step"]]
    before = own[evidence.calls["step"][own] == call["step"] - 1] if call["step"] else own[:0]
    place = int(np.flatnonzero(now == row)[0])
    if place >= len(before):
        return False
    return any(evidence.calls[name][before[place]] != call[name] for name in COMPARED_MESSAGE)
