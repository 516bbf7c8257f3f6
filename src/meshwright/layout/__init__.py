"""Layout: the parallel configuration, ranks and groups in any order, validation, the rank map (see docs/design.md)."""

from meshwright.layout.communication import (
    AxisPattern,
    analyze_communication_patterns,
    communication_patterns,
    describe,
    with_ledger,
)
from meshwright.layout.config import AXES, ContextVariant, HybridParallelConfig, Precision, Recompute, Schedule
from meshwright.layout.draw import rank_map
from meshwright.layout.grid import Grid, RankLayout, rank_layout
from meshwright.layout.rules import ClusterFacts, ModelFacts
from meshwright.layout.validate import legal_mask, validate, violations

__all__ = [
    "AXES",
    "AxisPattern",
    "ClusterFacts",
    "ContextVariant",
    "Grid",
    "HybridParallelConfig",
    "ModelFacts",
    "Precision",
    "RankLayout",
    "Recompute",
    "Schedule",
    "analyze_communication_patterns",
    "communication_patterns",
    "describe",
    "legal_mask",
    "rank_layout",
    "rank_map",
    "validate",
    "violations",
    "with_ledger",
]
