"""Pipeline schedules as data: build them by name, check them, time them, or ask for their bubble in closed form."""

from meshwright.schedules.actions import Action, ActionKind, PipelineSchedule
from meshwright.schedules.builders import build
from meshwright.schedules.check import CheckResult, Defect, Problem, check, peak_live
from meshwright.schedules.closed_form import bubble_fraction, bubble_microbatches, live_microbatches
from meshwright.schedules.communication import batches, with_communication
from meshwright.schedules.placement import chunk_owner, chunks_of_stage, is_v_shaped
from meshwright.schedules.timing import Durations, Timeline, simulate

__all__ = [
    "Action",
    "ActionKind",
    "CheckResult",
    "Defect",
    "Durations",
    "PipelineSchedule",
    "Problem",
    "Timeline",
    "batches",
    "bubble_fraction",
    "bubble_microbatches",
    "build",
    "check",
    "chunk_owner",
    "chunks_of_stage",
    "is_v_shaped",
    "live_microbatches",
    "peak_live",
    "simulate",
    "with_communication",
]
