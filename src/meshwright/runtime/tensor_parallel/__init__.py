"""Tensor-parallel layers (Shoeybi et al. 2019) with sequence parallelism (Korthikanti et al. 2022).

Parameters are DTensors on the tp mesh, so that FSDP2 and distributed checkpoints compose with them; products run on
local tensors with explicit, recorded collectives.
"""

from meshwright.runtime.tensor_parallel.attention import SequenceParallelAttention
from meshwright.runtime.tensor_parallel.cross_entropy import cross_entropy_sum, vocab_parallel_cross_entropy
from meshwright.runtime.tensor_parallel.embedding import VocabParallelEmbedding
from meshwright.runtime.tensor_parallel.linear import ColumnParallelLinear, FusedColumnParallelLinear, RowParallelLinear
from meshwright.runtime.tensor_parallel.region import TensorParallelRegion

__all__ = [
    "ColumnParallelLinear",
    "FusedColumnParallelLinear",
    "RowParallelLinear",
    "SequenceParallelAttention",
    "TensorParallelRegion",
    "VocabParallelEmbedding",
    "cross_entropy_sum",
    "vocab_parallel_cross_entropy",
]
