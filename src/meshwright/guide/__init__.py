"""The names of the hybrid-parallelism guide as public API, each doing the real thing (docs/from-the-guide.md).

In: the guide's own parameters, with keyword refinements. Out: objects that hold what the guide's functions returned,
and the estimates behind it. Models given by a parameter count get a stated, typical shape (models.typical_shape).
"""

from meshwright.guide.memory import MemoryUsage, analyze_memory_usage
from meshwright.guide.recommend import Recommendation, recommend_parallelism_config
from meshwright.guide.scaling import ScalingEfficiency, model_scaling_efficiency
from meshwright.guide.strategies import (
    ServingChoice,
    latency_optimized_strategy,
    memory_constrained_strategy,
    throughput_optimized_strategy,
)
from meshwright.guide.volume import CommunicationVolume, analyze_communication_volume
from meshwright.layout.communication import analyze_communication_patterns
from meshwright.layout.config import HybridParallelConfig

__all__ = [
    "CommunicationVolume",
    "HybridParallelConfig",
    "MemoryUsage",
    "Recommendation",
    "ScalingEfficiency",
    "ServingChoice",
    "analyze_communication_patterns",
    "analyze_communication_volume",
    "analyze_memory_usage",
    "latency_optimized_strategy",
    "memory_constrained_strategy",
    "model_scaling_efficiency",
    "recommend_parallelism_config",
    "throughput_optimized_strategy",
]
