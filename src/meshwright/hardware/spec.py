"""Accelerators, links and clusters as data. All units SI: bytes, bytes/s, FLOP/s, seconds, one direction.

Values come from `data/*.toml`, where each carries its source; users write clusters in the same form. These
dataclasses are the schema of those files: a field added here (with a default) may be given there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meshwright.errors import InputError


@dataclass(frozen=True)
class Accelerator:
    """One device. `peak_flops` maps precision name ('bf16', 'fp8', ...) to dense peak FLOP/s.

    `memory_bytes` is what a process can address; `reserved_bytes` what its context and communicator buffers take of
    that before the job has allocated anything (a cluster may override it). `kernels` are constants of the cost model's
    `Device` that were measured on this very device (`meshwright calibrate`); they replace those of its architecture.
    """

    name: str
    memory_bytes: int
    memory_bandwidth: float
    peak_flops: dict[str, float]
    sm_count: int
    architecture: str  # 'volta', 'ampere', 'hopper', 'blackwell', 'cdna3', 'cpu', ...
    power_w: float | None = None
    reserved_bytes: int = 0
    kernels: dict[str, float] = field(default_factory=dict[str, float])
    sources: dict[str, str] = field(default_factory=dict[str, str])

    def peak(self, precision: str) -> float:
        """Dense peak FLOP/s in a precision; an InputError where the device has no units for it."""
        try:
            return self.peak_flops[precision]
        except KeyError:
            valid = ", ".join(self.peak_flops)
            raise InputError(f"{self.name} has no {precision} matrix units; it computes in {valid}") from None


@dataclass(frozen=True)
class Link:
    """A link as one device sees it. `bandwidth` is bytes/s one way per device; `efficiency` the share that large
    collectives reach; `latency_s` per hop."""

    name: str
    bandwidth: float
    latency_s: float
    efficiency: float = 0.8
    source: str = ""


@dataclass(frozen=True)
class Cluster:
    """`nodes` x `gpus_per_node` devices. The fast link reaches `domain` devices (8 in an HGX node, 72 in NVL72);
    beyond it traffic takes `inter`, divided by `oversubscription` above the first switch level.

    `inter.bandwidth` is already per device: the loader has multiplied the adapter's by `nics_per_gpu`.
    `reserved_bytes` is what context, NCCL buffers and allocator slack take from a device: stated, overridable.
    `shared_cores`: where the devices of a node are processes of one CPU, the cores that they share (None: each device
    computes alone); a job that puts more ranks on a node than that takes turns (cost.shared_cores).
    """

    name: str
    accelerator: Accelerator
    nodes: int
    gpus_per_node: int
    domain: int
    intra: Link
    inter: Link
    nics_per_gpu: float = 1.0
    oversubscription: float = 1.0
    reserved_bytes: int = 0
    shared_cores: float | None = None
    sources: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> int:
        """Memory of a device that a job may fill."""
        return self.accelerator.memory_bytes - self.reserved_bytes
