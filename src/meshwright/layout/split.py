"""How the decoder layers of a model are dealt to the chunks of a pipeline, in model order."""

from __future__ import annotations

from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig


def even_split(layers: int, chunks: int) -> tuple[int, ...]:
    """Layers of each chunk as even as can be, the longer ones in the middle: the first and last chunks also carry
    the embedding and the head, so they get the short end."""
    base, extra = divmod(layers, chunks)
    split = [base] * chunks
    start = (chunks - extra) // 2
    for i in range(start, start + extra):
        split[i] += 1
    return tuple(split)


def layer_ranges(config: HybridParallelConfig, layers: int) -> tuple[range, ...]:
    """The decoder layers of each of the pp * vpp chunks, in model order."""
    chunks = config.pp * config.vpp
    split = config.layer_split or even_split(layers, chunks)
    if len(split) != chunks or sum(split) != layers or min(split) < 0:
        raise InputError(
            f"layer_split {list(split)} must give {chunks} chunks (pp x vpp) that sum to {layers} layers; "
            f"try {list(even_split(layers, chunks))}"
        )
    starts = [sum(split[:i]) for i in range(chunks)]
    return tuple(range(start, start + count) for start, count in zip(starts, split, strict=True))
