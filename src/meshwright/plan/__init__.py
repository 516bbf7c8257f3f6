"""The plan: one small, versioned YAML file that says what was decided (see docs/design.md)."""

from meshwright.plan.document import Plan
from meshwright.plan.sections import (
    ClusterSection,
    EstimateSummary,
    ModelSection,
    Provenance,
    ServingWorkload,
    TrainingRun,
    TrainingWorkload,
)

__all__ = [
    "ClusterSection",
    "EstimateSummary",
    "ModelSection",
    "Plan",
    "Provenance",
    "ServingWorkload",
    "TrainingRun",
    "TrainingWorkload",
]
