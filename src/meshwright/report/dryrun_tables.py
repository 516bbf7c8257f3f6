"""A dry run for people: per rank what was compared and what differs, memory by kind, and its course over the step.

In: the document of a proof (dryrun/document.py) and the curves of live bytes. Out: text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meshwright.report.numbers import seconds, size
from meshwright.report.plots import Series, plot

Curve = Sequence[tuple[int, int]]
GIB = 2**30
STATE = ("parameters", "gradients", "optimizer")
MOST_LINES = 20
"""Differences and hangs printed of one rank; --json has all."""


def proof_text(document: dict[str, Any], curves: Sequence[Curve]) -> str:
    """All ranks, then the verdict."""
    lines: list[str] = []
    for rank in document["ranks"]:
        lines += _rank(rank)
    fullest = max(range(len(curves)), key=lambda i: document["ranks"][i]["memory"]["peak"]["total_bytes"])
    lines += [_course(curves[fullest], document["ranks"][fullest]["rank"])]
    lines += [f"hang: {_hang(h)}" for h in document["hangs"][:MOST_LINES]]
    lines.append(_verdict(document))
    return "\n".join(lines)


def _rank(rank: dict[str, Any]) -> list[str]:
    at = " ".join(f"{axis} {n}" for axis, n in rank["coordinate"].items())
    calls = sum(line["calls"] for line in rank["traced"])
    total = sum(line["total_bytes"] for line in rank["traced"])
    verdict = "DIFFERS from the cost model's ledger" if rank["differences"] else "equal to the cost model's ledger"
    lines = [
        f"rank {rank['rank']} ({at}), {seconds(rank['seconds'])}: {calls:,} collectives of {size(total)} in "
        f"{len(rank['traced'])} lines, {verdict}"
    ]
    if rank["microbatches_repeated"]:
        lines.append(f"  {rank['microbatches_repeated']} microbatches only repeat others and were not run again")
    lines += [f"  {_difference(d)}" for d in rank["differences"][:MOST_LINES]]
    memory = rank["memory"]
    predicted, traced = memory["predicted"], memory["traced"]
    for kind in STATE:
        if kind in predicted or kind in traced:
            lines.append(f"  {kind}: {size(traced.get(kind, 0))} traced, {size(predicted.get(kind, 0))} predicted")
    working = sum(n for kind, n in predicted.items() if kind not in STATE)
    peak = memory["peak_without_state"]
    lines.append(f"  beside them at most {size(peak['total_bytes'])} traced, {size(working)} predicted{_when(peak)}")
    lines.append(f"  peak of all: {size(memory['peak']['total_bytes'])}{_when(memory['peak'])}")
    lines += [f"  memory DIFFERS: {_memory_difference(d)}" for d in memory["differences"]]
    if not memory["peak_judged"]:
        lines.append(
            "  the peak is no part of the verdict: this family's program is not written down in the cost model"
        )
    return lines


def _memory_difference(d: dict[str, Any]) -> str:
    line = f"{d['what']}: {d['predicted']:,} bytes predicted, {d['traced']:,} traced"
    return f"{line} ({d['predicted'] / d['traced'] - 1.0:+.1%})" if d["traced"] else line


def _when(peak: dict[str, Any]) -> str:
    module = f" in {peak['module']}" if peak["module"] else ""
    return f", at {peak['action']}{module}"


def _counts(counts: list[int] | tuple[int, int] | None) -> str:
    return "nothing" if counts is None else f"{counts[0]:,} calls, {counts[1]:,} bytes"


def _difference(d: dict[str, Any]) -> str:
    line = f"{d['axis']} {d['collective']} {d['phase']} '{d['what']}' over {d['group_size']}"
    return f"{line}: predicted {_counts(d['predicted'])}; traced {_counts(d['traced'])}"


def _hang(h: dict[str, Any]) -> str:
    return f"rank {h['rank']}, axis {h['axis']}, at {h['action']}: {h['problem']}"


def _course(curve: Curve, rank: int) -> str:
    at = list(range(len(curve)))
    series = [
        Series("all live bytes", at, [total / GIB for total, _ in curve]),
        Series("without state", at, [working / GIB for _, working in curve]),
    ]
    return plot(series, x_label=f"allocations of the step on rank {rank}", y_label="GiB", y_from=0.0)


def _verdict(document: dict[str, Any]) -> str:
    ranks = document["ranks"]
    if document["agrees"]:
        judged = all(r["memory"]["peak_judged"] for r in ranks)
        return (
            f"proved: ledgers equal to the call and the byte; {len(document['matched_ranks'])} traces match and come "
            f"to their end; state as predicted{', peaks beside it within 3 %' if judged else ''}"
        )
    traffic = sum(bool(r["differences"]) for r in ranks)
    memory = sum(bool(r["memory"]["differences"]) for r in ranks)
    return (
        f"not proved: of {len(ranks)} ranks {traffic} differ in their ledger and {memory} in memory, "
        f"{len(document['hangs'])} findings of hangs"
    )
