"""Router load of a step: how many tokens each expert got, and how many rows each rank worked on.

In: the expert modules of this rank's chunks, after a step. Out: a `RouterLoad` of the whole job, equal on all ranks; it
costs one all-reduce over the world, outside the step and its ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from meshwright.runtime.expert_parallel.module import ExpertParallelMoE


@dataclass(frozen=True)
class RouterLoad:
    """Of one step over the global batch. `tokens_per_expert`: summed over layers; `rows_per_rank`: rows that experts
    of each rank worked on, padding to a capacity included; `imbalance_per_layer`: tokens of the fullest expert over the
    mean, by global layer index; `dropped`: copies of tokens beyond the capacity."""

    tokens_per_expert: tuple[int, ...]
    rows_per_rank: tuple[int, ...]
    imbalance_per_layer: dict[int, float]
    dropped: int


def router_load(
    mixtures: Mapping[int, ExpertParallelMoE], layers: int, experts: int, device: torch.device
) -> RouterLoad:
    """`mixtures`: this rank's expert modules by global layer index. Called on all ranks."""
    world, rank = dist.get_world_size(), dist.get_rank()
    counts = torch.zeros((layers, experts), dtype=torch.int64, device=device)
    rows = torch.zeros(world + 1, dtype=torch.int64, device=device)
    for layer, module in mixtures.items():
        if module.load.tokens is not None:
            counts[layer] += module.load.tokens
        rows[rank] += module.load.rows
        rows[world] += module.load.dropped
    everything = torch.cat((counts.flatten(), rows))
    dist.all_reduce(everything)
    numbers: list[int] = everything.tolist()
    by_layer = [numbers[i * experts : (i + 1) * experts] for i in range(layers)]
    return RouterLoad(
        tokens_per_expert=tuple(sum(column) for column in zip(*by_layer, strict=True)),
        rows_per_rank=tuple(numbers[layers * experts : -1]),
        imbalance_per_layer={i: max(row) * experts / sum(row) for i, row in enumerate(by_layer) if sum(row)},
        dropped=numbers[-1],
    )
