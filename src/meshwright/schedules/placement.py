"""Which stage holds which chunk of the model: round robin, or V-shaped where a schedule goes down and comes back.

Chunks are numbered in model order, 0 .. stages * chunks_per_stage - 1. In a V-shaped placement every other turn runs
backwards over the stages, so that the first and the last chunk meet on stage 0 (Qi et al. 2024, section 3).
"""

from __future__ import annotations

from meshwright.layout.config import V_SHAPED, Schedule


def is_v_shaped(schedule: Schedule) -> bool:
    """Whether the schedule places its chunks in a V."""
    return schedule in V_SHAPED


def chunk_owner(chunk: int, pp: int, vpp: int, v_shaped: bool) -> int:
    """The stage that holds a chunk (chunks in model order)."""
    if not 0 <= chunk < pp * vpp:
        raise ValueError(f"chunk {chunk} is not one of the {pp * vpp} chunks")
    turn, position = divmod(chunk, pp)
    return pp - 1 - position if v_shaped and turn % 2 else position


def chunks_of_stage(stage: int, pp: int, vpp: int, v_shaped: bool) -> tuple[int, ...]:
    """The chunks that a stage holds, in model order."""
    return tuple(c for c in range(pp * vpp) if chunk_owner(c, pp, vpp, v_shaped) == stage)


__all__ = ["V_SHAPED", "chunk_owner", "chunks_of_stage", "is_v_shaped"]
