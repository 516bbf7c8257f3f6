"""The runtime: train a Hugging Face decoder by a plan, and prove the plan right (docs/runtime.md).

The names below are the public ones; each is imported from its module when first used, so that `import
meshwright.runtime` costs nothing and a part can be used without the rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshwright.runtime.engine import Engine, EngineOptions, StepResult, build_engine
    from meshwright.runtime.launch import choose_device, run_ranks
    from meshwright.runtime.parity import ParityJob, ParityReport, compare
    from meshwright.runtime.process_groups import AxisGroup, ProcessGroupManager, initialize_model_parallel
    from meshwright.runtime.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        SequenceParallelAttention,
        VocabParallelEmbedding,
        vocab_parallel_cross_entropy,
    )
    from meshwright.runtime.weights import SeededWeights

_MODULE_OF = {
    "AxisGroup": "process_groups",
    "ColumnParallelLinear": "tensor_parallel",
    "Engine": "engine",
    "EngineOptions": "engine",
    "ParityJob": "parity",
    "ParityReport": "parity",
    "ProcessGroupManager": "process_groups",
    "RowParallelLinear": "tensor_parallel",
    "SequenceParallelAttention": "tensor_parallel",
    "SeededWeights": "weights",
    "StepResult": "engine",
    "VocabParallelEmbedding": "tensor_parallel",
    "build_engine": "engine",
    "choose_device": "launch",
    "compare": "parity",
    "initialize_model_parallel": "process_groups",
    "run_ranks": "launch",
    "vocab_parallel_cross_entropy": "tensor_parallel",
}

__all__ = [
    "AxisGroup",
    "ColumnParallelLinear",
    "Engine",
    "EngineOptions",
    "ParityJob",
    "ParityReport",
    "ProcessGroupManager",
    "RowParallelLinear",
    "SeededWeights",
    "SequenceParallelAttention",
    "StepResult",
    "VocabParallelEmbedding",
    "build_engine",
    "choose_device",
    "compare",
    "initialize_model_parallel",
    "run_ranks",
    "vocab_parallel_cross_entropy",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
