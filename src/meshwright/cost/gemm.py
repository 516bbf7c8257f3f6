"""Seconds of a matrix product by its shape: tiles, waves over the multiprocessors, depth, alignment, memory traffic.

In: the device's constants and arrays m, n, k (per group; `groups` of equal shape run as one grouped product).
Out: seconds. A wave is one tile on every multiprocessor; the last wave is partly idle (wave quantisation, NVIDIA 2023,
"Matrix Multiplication Background User's Guide", section 4); a tile's pipeline fills and drains once whatever its depth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from meshwright.cost.candidates import FloatArray
from meshwright.cost.device import Device
from meshwright.hardware.spec import Accelerator

ALIGNED = 64  # elements: 128 bytes of 16-bit data, a full memory transaction and swizzle atom
ALIGNED_HEAD = 8  # elements: 16 bytes, what tensor cores load at once; head sizes are padded to tiles beyond that
BATCHED_DEPTH = 0.25
"""Of `k_half`, what a batched product of attention loses: its tiles are small, several share a multiprocessor, and one
fills its pipeline while another computes."""


@dataclass(frozen=True)
class Gemm:
    """What every product of a precision shares: reachable FLOP/s, bytes/s, bytes per operand and result element."""

    device: Device
    sm_count: int
    flops: float
    bandwidth: float
    operand_bytes: float = 2.0
    result_bytes: float = 2.0
    k_half: float = 0.0
    aligned: int = ALIGNED

    @classmethod
    def of(cls, accelerator: Accelerator, device: Device, peak: float, share: float, operand_bytes: float) -> Gemm:
        """A product engine that reaches `share` of `peak` on large products."""
        bandwidth = accelerator.memory_bandwidth * device.memory
        return cls(device, accelerator.sm_count, peak * share, bandwidth, operand_bytes, k_half=device.k_half)

    def batched(self) -> Gemm:
        """The engine of attention's batched products."""
        return replace(self, k_half=BATCHED_DEPTH * self.k_half, aligned=ALIGNED_HEAD)

    def seconds(
        self, m: FloatArray, n: FloatArray, k: FloatArray, groups: FloatArray | float = 1.0, result_bytes: float = 0.0
    ) -> FloatArray:
        """Roofline of the best tile's compute time and the traffic of both operands and the result, and a launch."""
        traffic = groups * ((m * k + n * k) * self.operand_bytes + m * n * (result_bytes or self.result_bytes))
        compute = np.full(np.broadcast_shapes(np.shape(m), np.shape(n), np.shape(k)), np.inf)
        efficiency = 1.0
        for tile_m, tile_n in self.device.tiles:
            compute = np.minimum(compute, self._tiled(m, n, k, groups, tile_m, tile_n) / efficiency)
            efficiency *= self.device.small_tile
        return np.maximum(compute / self._alignment(n, k), traffic / self.bandwidth) + self.device.launch_s

    def _tiled(
        self, m: FloatArray, n: FloatArray, k: FloatArray, groups: FloatArray | float, tile_m: int, tile_n: int
    ) -> FloatArray:
        """Waves x the time of one tile on one multiprocessor. Large last waves weigh little in long products."""
        tiles = groups * np.ceil(m / tile_m) * np.ceil(n / tile_n)
        even = tiles / self.sm_count
        waves = even + self.device.quantisation * (np.ceil(even) - even)
        return waves * (2.0 * tile_m * tile_n) * (k + self.k_half) * (self.sm_count / self.flops)

    def _alignment(self, n: FloatArray, k: FloatArray) -> FloatArray:
        """Efficiency lost where a contiguous side is no multiple of the memory system's natural unit."""
        return np.where((n % self.aligned == 0) & (k % self.aligned == 0), 1.0, self.device.misaligned)
