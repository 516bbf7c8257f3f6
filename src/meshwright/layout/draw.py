"""The rank map as text: per replica the ranks of every stage, with node boundaries; large jobs are elided.

In: a config (or a RankLayout) and the devices per node. Out: a string; `report` and the command line print it.
"""

from __future__ import annotations

import numpy as np

from meshwright.layout.config import HybridParallelConfig
from meshwright.layout.grid import RankArray, RankLayout, rank_layout

MAX_REPLICAS = 4
MAX_STAGES = 8
MAX_RANKS = 16


def rank_map(
    layout: HybridParallelConfig | RankLayout,
    *,
    gpus_per_node: int = 8,
    max_replicas: int = MAX_REPLICAS,
    max_stages: int = MAX_STAGES,
) -> str:
    """One block per dp replica, one line per pipeline stage; '|' is a node boundary, ( ) a context-parallel rank."""
    if isinstance(layout, HybridParallelConfig):
        layout = rank_layout(layout)
    config = layout.config
    blocks = [_title(layout, gpus_per_node)]
    width = len(str(config.world_size - 1))
    for replica in _some(config.dp, max_replicas):
        if replica is None:
            blocks.append(f"... {config.dp - max_replicas} more replicas")
            continue
        lines = [f"replica dp={replica}"]
        for stage in _some(config.pp, max_stages):
            if stage is None:
                lines.append(f"  ... {config.pp - max_stages} more stages")
            else:
                lines.append(f"  stage pp={stage}: {_stage(layout, replica, stage, gpus_per_node, width)}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _title(layout: RankLayout, gpus_per_node: int) -> str:
    config = layout.config
    nodes = -(-config.world_size // gpus_per_node)
    experts = ""
    if config.ep * config.expert_tp > 1:
        experts = f"; experts expert_dp {config.expert_dp} x ep {config.ep} x expert_tp {config.expert_tp} in a stage"
    return (
        f"dp {config.dp} x pp {config.pp} x cp {config.cp} x tp {config.tp} = {config.world_size} ranks on {nodes} "
        f"node{'s' if nodes > 1 else ''} of {gpus_per_node}, order {layout.order}{experts}"
    )


def _some(count: int, most: int) -> list[int | None]:
    """0..count-1, or the first ones, None for a gap, and the last."""
    if count <= most:
        return list(range(count))
    return [*range(most - 1), None, count - 1]


def _stage(layout: RankLayout, replica: int, stage: int, gpus_per_node: int, width: int) -> str:
    """The cp x tp ranks of a stage of a replica, and the nodes they are on."""
    ranks = replica_ranks(layout, replica)[stage]  # [cp, tp]
    opening, closing = "()" if len(ranks) > 1 else "[]"
    words: list[str] = []
    shown = ranks.ravel()[:MAX_RANKS]
    for position, rank in enumerate(int(r) for r in shown):
        place = position % layout.config.tp
        if position and rank // gpus_per_node != int(shown[position - 1]) // gpus_per_node:
            words.append("|")
        last = place == layout.config.tp - 1 or position == len(shown) - 1
        words.append(f"{opening if place == 0 else ''}{rank:>{width}}{closing if last else ''}")
    rest = ranks.size - len(shown)
    more = f" ... {rest} more, up to {int(ranks.max())}" if rest else ""
    return " ".join(words) + more + f"  {_nodes(ranks, gpus_per_node)}"


def _nodes(ranks: RankArray, gpus_per_node: int) -> str:
    first, last = int(ranks.min()) // gpus_per_node, int(ranks.max()) // gpus_per_node
    return f"node {first}" if first == last else f"nodes {first} to {last}"


def replica_ranks(layout: RankLayout, replica: int) -> RankArray:
    """[pp, cp, tp]: the ranks of one dp replica in any order."""
    config = layout.config
    inner = layout.dense.sizes["dp"]  # vLLM cuts dp in two
    place = {"dp": replica % inner}
    if "external_dp" in layout.dense.axes:
        place["external_dp"] = replica // inner
    stage, context, tensor = np.ogrid[: config.pp, : config.cp, : config.tp]
    return layout.rank(**place, pp=stage, cp=context, tp=tensor)
