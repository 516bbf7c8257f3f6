"""Orders of one stage for GPipe, 1F1B and interleaved 1F1B (Huang et al. 2019; Narayanan et al. 2021).

Each function returns the actions of one stage as (kind, local chunk, microbatch); the caller numbers the chunks.
"""

from __future__ import annotations

from meshwright.schedules.actions import ActionKind

LocalAction = tuple[ActionKind, int, int]


def gpipe_order(stage: int, stages: int, microbatches: int) -> list[LocalAction]:
    """All forwards, then all backwards (Huang et al. 2019)."""
    del stage, stages  # the same everywhere
    forwards: list[LocalAction] = [(ActionKind.FORWARD, 0, mb) for mb in range(microbatches)]
    return forwards + [(ActionKind.BACKWARD, 0, mb) for mb in range(microbatches)]


def one_f_one_b_order(stage: int, stages: int, microbatches: int) -> list[LocalAction]:
    """PipeDream-flush: stage s runs p - s - 1 forwards ahead, then alternates (Narayanan et al. 2021, 2.2.1)."""
    forwards: list[LocalAction] = [(ActionKind.FORWARD, 0, mb) for mb in range(microbatches)]
    backwards: list[LocalAction] = [(ActionKind.BACKWARD, 0, mb) for mb in range(microbatches)]
    return alternate(forwards, backwards, ahead=stages - stage - 1)


def interleaved_order(stage: int, stages: int, microbatches: int, chunks: int) -> list[LocalAction]:
    """Interleaved 1F1B (Narayanan et al. 2021, section 2.2.2) for any number of microbatches.

    Microbatches go through the chunks in groups. The paper's groups have p microbatches each; where p does not divide
    m they are made as even as can be and no smaller than p, so that a chunk's input is there when its turn comes.
    Stage s runs 2 (p - s - 1) + (v - 1) g forwards ahead, g being the largest group.
    """
    groups = microbatch_groups(stages, microbatches)
    forwards: list[LocalAction] = []
    backwards: list[LocalAction] = []
    start = 0
    for size in groups:
        for turn in range(chunks):
            window = range(start, start + size)
            forwards += [(ActionKind.FORWARD, turn, mb) for mb in window]
            backwards += [(ActionKind.BACKWARD, chunks - 1 - turn, mb) for mb in window]
        start += size
    return alternate(forwards, backwards, ahead=2 * (stages - stage - 1) + (chunks - 1) * groups[0])


def microbatch_groups(stages: int, microbatches: int) -> list[int]:
    """Sizes of the groups of microbatches, larger ones first: at least `stages` each, fewer only if there are fewer."""
    count = max(1, microbatches // stages)
    base, extra = divmod(microbatches, count)
    return [base + 1] * extra + [base] * (count - extra)


def alternate(forwards: list[LocalAction], backwards: list[LocalAction], ahead: int) -> list[LocalAction]:
    """`ahead` forwards, then one forward and one backward in turn, then the backwards that are left."""
    ahead = min(ahead, len(forwards))
    order = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(forwards) - ahead :]
