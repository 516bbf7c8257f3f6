"""Expert parallelism: routed experts over the ep and expert_tp axes (docs/runtime.md)."""

from meshwright.runtime.expert_parallel.exchange import ExpertAxes
from meshwright.runtime.expert_parallel.module import ExpertOptions, ExpertParallelMoE, ExpertRegion
from meshwright.runtime.expert_parallel.routing import Routing
from meshwright.runtime.expert_parallel.split import split_experts

__all__ = ["ExpertAxes", "ExpertOptions", "ExpertParallelMoE", "ExpertRegion", "Routing", "split_experts"]
