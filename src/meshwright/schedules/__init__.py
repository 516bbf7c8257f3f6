"""Pipeline schedules as data: build them by name, check them, time them, or ask for their bubble in closed form."""

from meshwright.schedules.actions import Action, ActionKind, PipelineSchedule
from meshwright.schedules.builders import build
from meshwright.schedules.closed_form import bubble_fraction, bubble_microbatches, live_microbatches
from meshwright.schedules.placement import chunk_owner, chunks_of_stage, is_v_shaped
from meshwright.schedules.timing import Durations, Timeline, simulate

__all__ = [
    "Action",
    "ActionKind",
    "Durations",
    "PipelineSchedule",
    "Timeline",
    "bubble_fraction",
    "bubble_microbatches",
    "build",
    "chunk_owner",
    "chunks_of_stage",
    "is_v_shaped",
    "live_microbatches",
    "simulate",
]
