"""`doctor hang` for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from meshwright.doctor.environment import Advice
from meshwright.doctor.hang import Verdict


def hang_report(verdict: Verdict, advice: Sequence[Advice] = ()) -> RenderableType:
    style = "" if verdict.healthy else "bold red"
    lines = [Text(verdict.sentence, style=style), *(Text(f"  {detail}") for detail in verdict.details)]
    if len(verdict.chain) > 1:
        lines.append(Text("  waiting: rank " + " -> rank ".join(str(r) for r in verdict.chain)))
    if not verdict.healthy:
        lines += [Text(f"  {a.variable} ({a.kind}): {a.advice}") for a in advice]
    return Group(*lines)


def hang_document(verdict: Verdict, advice: Sequence[Advice] = ()) -> dict[str, Any]:
    return {
        "healthy": verdict.healthy,
        "cause": verdict.cause.value,
        "ranks": list(verdict.ranks),
        "axis": verdict.axis,
        "action": verdict.action,
        "group": list(verdict.group),
        "behind_s": verdict.behind_s,
        "chain": list(verdict.chain),
        "sentence": verdict.sentence,
        "details": list(verdict.details),
        "environment": [asdict(a) for a in advice],
    }
