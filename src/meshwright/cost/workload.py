"""What is computed (`Workload`) and how well the software does it (`Stack` is in cost.stack)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Optimizer(StrEnum):
    """Optimizer and the number formats of its state (bytes per parameter in cost.memory)."""

    ADAM_FP32 = "adam-fp32"  # fp32 weights: no master copy
    ADAM_MIXED = "adam-mixed"  # fp32 master weights, momentum, variance
    ADAM_BF16 = "adam-bf16"  # bf16 momentum and variance, no master
    ADAM_8BIT = "adam-8bit"
    SGD = "sgd"


@dataclass(frozen=True)
class Workload:
    """A training job's step, apart from how it is split. `seq` in tokens."""

    seq: int
    optimizer: Optimizer = Optimizer.ADAM_MIXED
    gradient_bytes: int = 4  # of the accumulated gradient, per parameter
    flash_attention: bool = True
    attention: str | None = None  # generation of the flash kernel (keys of Device.attention), without one 'eager' for
    # attention of separate kernels; None: the stack's, or a fused softmax
    fused_norm: bool | None = None  # None: as the stack does
    dropout: bool = False
    capacity_factor: float | None = None  # None: dropless MoE


@dataclass(frozen=True)
class ServingWorkload:
    """Requests of `prompt` input and `output` generated tokens (means). `weight_bytes` per element of quantised
    products (None: as the precision says); `prefix_hit_rate`: share of prompt tokens whose cache is there already;
    `pass_tokens`: most tokens of one forward pass, longer prompts are read in chunks (None: the engine's); `requests`:
    how many there are in all, of one length and sent at once (None: without end)."""

    prompt: int
    output: int
    kv_bytes_per_element: float = 2.0
    ttft_s: float | None = None
    tpot_s: float | None = None
    weight_bytes: float | None = None
    prefix_hit_rate: float = 0.0
    pass_tokens: int | None = None
    requests: int | None = None

    @property
    def read_tokens(self) -> float:
        """Prompt tokens that are computed: those not found in the cache."""
        return self.prompt * (1.0 - self.prefix_hit_rate)


WEIGHT_FORMAT_BYTES = {
    "fp8": 1.0,
    "int8": 1.0,
    "int4": 0.5 + 2.0 / 128,
    "mxfp4": 0.5 + 1.0 / 32,
    "nvfp4": 0.5 + 1.0 / 16,
}
"""Per element of a product's weight: int4 has a 16-bit scale per 128 elements (GPTQ, AWQ), MXFP4 an 8-bit one per 32
(OCP Microscaling v1.0), NVFP4 per 16."""
