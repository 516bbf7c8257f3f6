"""In which format a model is served where nobody says: as its checkpoint stores it.

In: a model (`weight_bits` is None for 16-bit checkpoints) and a device. Out: a `ServedFormat`: the precision of the
products and, where the device cannot multiply what is stored, the format of the weights alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.hardware.spec import Accelerator
from meshwright.layout.config import Precision
from meshwright.models.quantization import FORMAT_BITS
from meshwright.models.spec import ModelSpec

EIGHT_BITS = 7.5
"""Stored bits from which a checkpoint counts as one of 8 bits; scales add up to a quarter of a bit."""
MX_BITS = 4.2


@dataclass(frozen=True)
class ServedFormat:
    """`weight_format`: of `cost.workload.WEIGHT_FORMAT_BYTES`, None: weights are stored as they are multiplied."""

    precision: Precision
    weight_format: str | None = None


def stored_format(model: ModelSpec, accelerator: Accelerator) -> ServedFormat:
    """DeepSeek-V3's fp8 stays fp8 on Hopper; on Ampere its bytes are read and its products run in 16 bits."""
    bits = model.weight_bits
    if bits is None:
        return ServedFormat(Precision.BF16)
    if bits >= EIGHT_BITS:
        native = Precision.FP8 in accelerator.peak_flops
        return ServedFormat(Precision.FP8) if native else ServedFormat(Precision.BF16, "fp8")
    if bits == FORMAT_BITS["nvfp4"]:
        native = Precision.NVFP4 in accelerator.peak_flops
        return ServedFormat(Precision.NVFP4) if native else ServedFormat(Precision.BF16, "nvfp4")
    return ServedFormat(Precision.BF16, "mxfp4" if bits >= MX_BITS else "int4")
