"""Build a pipeline schedule by name: `build(schedule, stages, microbatches, chunks, forward_only)`.

In: sizes. Out: a `PipelineSchedule` of computation (sends and receives: `communication.with_communication`). Bad
sizes are an InputError.
"""

from __future__ import annotations

from collections.abc import Callable

from meshwright.errors import InputError
from meshwright.layout.config import Schedule
from meshwright.schedules.actions import Action, ActionKind, PipelineSchedule
from meshwright.schedules.one_forward_one_backward import (
    LocalAction,
    gpipe_order,
    interleaved_order,
    one_f_one_b_order,
)
from meshwright.schedules.placement import chunks_of_stage, is_v_shaped
from meshwright.schedules.zero_bubble import dualpipev_order, zb_h1_order, zbv_order

_PLAIN: dict[Schedule, Callable[[int, int, int], list[LocalAction]]] = {
    Schedule.GPIPE: gpipe_order,
    Schedule.ONE_F_ONE_B: one_f_one_b_order,
    Schedule.ZB_H1: zb_h1_order,
}
_V: dict[Schedule, Callable[[int, int, int], list[LocalAction]]] = {
    Schedule.ZBV: zbv_order,
    Schedule.DUALPIPEV: dualpipev_order,
}


def build(
    schedule: Schedule, stages: int, microbatches: int, chunks: int = 1, forward_only: bool = False
) -> PipelineSchedule:
    """The ordered computation of every stage. `chunks` is per stage: 1 for plain schedules, 2 for V-shaped ones."""
    _check_sizes(schedule, stages, microbatches, chunks)
    v_shaped = is_v_shaped(schedule)
    per_stage: list[tuple[Action, ...]] = []
    for stage in range(stages):
        own = chunks_of_stage(stage, stages, chunks, v_shaped)
        local = _local_order(schedule, stage, stages, microbatches, chunks)
        per_stage.append(
            tuple(
                Action(kind, own[chunk], mb)
                for kind, chunk, mb in local
                if mb < microbatches and not (forward_only and kind is not ActionKind.FORWARD)
            )
        )
    return PipelineSchedule(schedule, stages, microbatches, chunks, v_shaped, forward_only, tuple(per_stage))


def _local_order(schedule: Schedule, stage: int, stages: int, microbatches: int, chunks: int) -> list[LocalAction]:
    if schedule in _PLAIN:
        return _PLAIN[schedule](stage, stages, microbatches)
    if schedule in _V:
        # A V needs 2p microbatches to fill. With fewer, the order of 2p is built and the missing ones left out: what
        # remains depends on nothing that was dropped, so it stays free of cycles.
        return _V[schedule](stage, stages, max(microbatches, 2 * stages))
    return interleaved_order(stage, stages, microbatches, chunks)


def _check_sizes(schedule: Schedule, stages: int, microbatches: int, chunks: int) -> None:
    for what, value in (("pipeline stages", stages), ("microbatches", microbatches), ("chunks per stage", chunks)):
        if value < 1:
            raise InputError(f"{what} must be at least 1, got {value}")
    if is_v_shaped(schedule) and chunks != 2:
        raise InputError(f"schedule {schedule} has two chunks per stage: use vpp=2, not vpp={chunks}")
    if schedule in _PLAIN and chunks != 1:
        raise InputError(f"schedule {schedule} has one chunk per stage: use vpp=1 or schedule interleaved-1f1b")
    if schedule is Schedule.INTERLEAVED and chunks < 2:
        raise InputError("schedule interleaved-1f1b needs at least two chunks per stage: use vpp=2 or schedule 1f1b")
