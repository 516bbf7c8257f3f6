"""The public names, in one place: what `from meshwright import ...` offers (imported there on first use)."""

from meshwright.cost.estimate import Estimate
from meshwright.cost.evaluate import estimate
from meshwright.cost.serving import serve_estimate
from meshwright.cost.workload import ServingWorkload, Workload
from meshwright.doctor.diagnose import diagnose_efficiency, diagnose_oom
from meshwright.doctor.hang import diagnose_hang
from meshwright.errors import InputError
from meshwright.guide import (
    analyze_communication_patterns,
    analyze_communication_volume,
    analyze_memory_usage,
    latency_optimized_strategy,
    memory_constrained_strategy,
    model_scaling_efficiency,
    recommend_parallelism_config,
    throughput_optimized_strategy,
)
from meshwright.hardware import load as load_cluster
from meshwright.layout.config import HybridParallelConfig
from meshwright.layout.grid import rank_layout
from meshwright.models import ModelSpec
from meshwright.models import load as load_model
from meshwright.plan import Plan
from meshwright.planner.search import search
from meshwright.validation import validate_file

__all__ = [
    "Estimate",
    "HybridParallelConfig",
    "InputError",
    "ModelSpec",
    "Plan",
    "ServingWorkload",
    "Workload",
    "analyze_communication_patterns",
    "analyze_communication_volume",
    "analyze_memory_usage",
    "diagnose_efficiency",
    "diagnose_hang",
    "diagnose_oom",
    "estimate",
    "latency_optimized_strategy",
    "load_cluster",
    "load_model",
    "memory_constrained_strategy",
    "model_scaling_efficiency",
    "rank_layout",
    "recommend_parallelism_config",
    "search",
    "serve_estimate",
    "throughput_optimized_strategy",
    "validate_file",
]
