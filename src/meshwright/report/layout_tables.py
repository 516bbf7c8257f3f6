"""A layout as a person reads it: the rank map, the groups of every axis, what each axis communicates.

In: a `RankLayout` and the patterns of its axes. Out: rich renderables and the JSON document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.hardware import Cluster
from meshwright.layout.communication import AxisPattern, communication_patterns
from meshwright.layout.config import HybridParallelConfig
from meshwright.layout.draw import rank_map
from meshwright.layout.grid import RankLayout
from meshwright.report.fitted_table import table
from meshwright.report.json_documents import config_document, plain
from meshwright.report.numbers import size, whole

MOST_GROUPS, MOST_RANKS = 4, 10
SYMBOLS = (
    "b micro batch, s sequence, h hidden, a bytes per element, k experts per token, P parameters of a rank; "
    "values need --model (and --seq)"
)


def layout_report(
    layout: RankLayout, patterns: Sequence[AxisPattern], gpus_per_node: int, domain: int
) -> RenderableType:
    """Rank map, groups, communication pattern of every axis."""
    if not patterns:
        return Group(Text(rank_map(layout, gpus_per_node=gpus_per_node)), Text("One rank: nothing is communicated."))
    return Group(
        Text("Rank map", style="bold"),
        Text(rank_map(layout, gpus_per_node=gpus_per_node)),
        Text(),
        groups_table(layout, patterns),
        Text(),
        patterns_table(patterns, domain),
        Text(SYMBOLS, style="dim") if all(p.bytes_per_call is None for p in patterns) else Text(),
    )


def groups_table(layout: RankLayout, patterns: Sequence[AxisPattern]) -> Table:
    """The groups of every axis that is split: how many, how large, the first ones."""
    made = table("Groups", "axis", "first groups", "groups", "ranks each", left=2)
    for pattern in patterns:
        groups = group_lists(layout, pattern.axis)
        more = " ..." if len(groups) > MOST_GROUPS else ""
        made.add_row(pattern.axis, " ".join(_ranks(g) for g in groups[:MOST_GROUPS]) + more, whole(pattern.groups),
                     whole(pattern.group_size))  # fmt: skip
    return made


def group_lists(layout: RankLayout, axis: str) -> list[list[int]]:
    """The groups of an axis as the patterns count them: gradients are reduced over dp x cp."""
    groups = layout.groups("dp_cp" if axis == "dp" else axis)
    return [[int(rank) for rank in group] for group in groups]


def _ranks(group: Sequence[int]) -> str:
    """'0-7' for consecutive ranks, '0,8,16' for others, elided where long."""
    if len(group) > 2 and group == list(range(group[0], group[-1] + 1)):
        return f"[{group[0]}-{group[-1]}]"
    head = ",".join(str(rank) for rank in group[:MOST_RANKS])
    return f"[{head}]" if len(group) <= MOST_RANKS else f"[{head}..{group[-1]}]"


def patterns_table(patterns: Sequence[AxisPattern], domain: int) -> Table:
    """Collective, how often, bytes per call as formula and value, the link crossed, how demanding it is."""
    valued = any(pattern.bytes_per_call is not None for pattern in patterns)
    values = ("calls/step", "bytes/call") if valued else ()
    columns = ("axis", "demand", "collective", "how often", "bytes per call", f"link (fast domain of {domain})")
    made = table("Communication", *columns, *values, left=len(columns))
    for pattern in patterns:
        cells = (
            (
                whole(pattern.calls_per_step) if pattern.calls_per_step is not None else "-",
                size(pattern.bytes_per_call) if pattern.bytes_per_call is not None else "-",
            )
            if valued
            else ()
        )
        made.add_row(pattern.axis, pattern.demand, pattern.collective, pattern.how_often, pattern.bytes_formula,
                     link_words(pattern), *cells)  # fmt: skip
    return made


def axis_links(config: HybridParallelConfig, cluster: Cluster) -> dict[str, str]:
    """The link that each axis of a configuration crosses, by name, in the default rank order."""
    return {
        pattern.axis: cluster.intra.name if pattern.inside_domain else cluster.inter.name
        for pattern in communication_patterns(config, domain=cluster.domain)
    }


def link_words(pattern: AxisPattern) -> str:
    if pattern.inside_domain:
        return "fast link only"
    if pattern.members_per_domain == 1:
        return "network: every member in a domain of its own"
    return f"network, {pattern.members_per_domain} members in each fast domain"


def layout_document(
    layout: RankLayout, patterns: Sequence[AxisPattern], gpus_per_node: int, domain: int
) -> dict[str, Any]:
    """The configuration, the coordinates of every rank by axis, the groups and patterns of every split axis."""
    ranks = list(range(layout.world_size))
    return {
        "config": config_document(layout.config),
        "order": layout.order,
        "gpus_per_node": gpus_per_node,
        "domain": domain,
        "coordinates": plain(layout.coordinates(ranks)),
        "groups": {pattern.axis: group_lists(layout, pattern.axis) for pattern in patterns},
        "communication": [plain(pattern) for pattern in patterns],
    }
