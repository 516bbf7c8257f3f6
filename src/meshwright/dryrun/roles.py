"""Which ranks to run: one of every kind, as far as the layout makes them differ, or those that were asked for."""

from __future__ import annotations

from meshwright.cost.program.chunk import layers_of
from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig, Recompute
from meshwright.layout.grid import rank_layout
from meshwright.layout.split import layer_ranges
from meshwright.models.spec import ModelSpec
from meshwright.schedules.placement import chunks_of_stage, is_v_shaped

Contents = tuple[tuple[bool, bool, tuple[tuple[int, bool], ...]], ...]
"""Of every chunk of a stage: whether it is the first or the last of the model, and of each of its layers the kind and
whether it is recomputed."""


def stage_contents(model: ModelSpec, config: HybridParallelConfig, stage: int) -> Contents:
    """What a stage holds; stages with equal contents run the same code in another order."""
    ranges = layer_ranges(config, len(model.pattern))
    chunks = chunks_of_stage(stage, config.pp, config.vpp, is_v_shaped(config.schedule))
    full = config.recompute_every if config.recompute is Recompute.FULL else None
    return tuple((c == 0, c == len(ranges) - 1, layers_of(model.pattern, ranges[c], full)) for c in chunks)


def distinct_ranks(model: ModelSpec, config: HybridParallelConfig) -> tuple[int, ...]:
    """One rank of every role: the first stage of each content (it holds most microbatches at once, in a V the last),
    and where tp does not divide the vocabulary also the last tp rank, which holds fewer rows."""
    stage_of: dict[Contents, int] = {}
    for stage in range(config.pp):
        contents = stage_contents(model, config, stage)
        if is_v_shaped(config.schedule) or contents not in stage_of:
            stage_of[contents] = stage
    tp_ranks = [0, config.tp - 1] if model.vocab % config.tp else [0]
    layout = rank_layout(config)
    return tuple(sorted(int(layout.rank(pp=stage, tp=tp)) for stage in stage_of.values() for tp in tp_ranks))


def chosen_ranks(text: str | None, model: ModelSpec, config: HybridParallelConfig) -> tuple[int, ...]:
    """'0,last', 'all', or None for the distinct ones."""
    if text is None:
        return distinct_ranks(model, config)
    if text.strip() == "all":
        return tuple(range(config.world_size))
    chosen: set[int] = set()
    for word in (w.strip() for w in text.split(",")):
        if word != "last" and not (word.isascii() and word.isdigit()):
            raise InputError(f"--ranks {text!r} is not a list of ranks; give numbers and 'last' like 0,8,last, or all")
        rank = config.world_size - 1 if word == "last" else int(word)
        if rank >= config.world_size:
            raise InputError(f"--ranks {text!r}: the plan's last rank is {config.world_size - 1}")
        chosen.add(rank)
    return tuple(sorted(chosen))
