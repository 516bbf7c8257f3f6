"""The cluster of a measurement row: a catalogued device, and the sizes and link speeds that the row states.

Latencies, efficiencies and the reserve come from the catalogued cluster with that device whose links are nearest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from meshwright.errors import InputError
from meshwright.hardware import accelerator, clusters
from meshwright.hardware.spec import Accelerator, Cluster
from meshwright.models.fields import Fields
from meshwright.validation.skip import SkippedError

FABRICS = ("efa", "roce", "slingshot")
"""Networks other than InfiniBand that a row's notes may name; catalogued links are named after them."""


@dataclass(frozen=True)
class ClusterFacts:
    """What a row says of its cluster; bandwidths in bytes/s per device, one direction (None: not said)."""

    gpu: str
    gpus: int
    gpus_per_node: int
    domain: int | None
    intra: float | None
    inter: float | None
    fabric: str

    @classmethod
    def of(cls, row: Fields) -> ClusterFacts:
        notes = row.text("notes").lower().replace(",", " ").replace(".", " ").split()
        gpu = row.text("gpu")
        if not gpu:
            raise SkippedError("gpu is not stated")
        gpus = row.size("gpus")
        per_node = min(row.size("gpus_per_node", default=8), gpus)  # a job on part of a node has no more devices
        return cls(
            gpu=gpu,
            gpus=gpus,
            gpus_per_node=per_node,
            domain=row.whole("nvlink_domain"),
            intra=_bandwidth(row, "intra_bw"),
            inter=_bandwidth(row, "inter_bw"),
            fabric=next((f for f in FABRICS if f in notes), ""),
        )

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    def build(self) -> Cluster:
        """The cluster; a device that the catalogue lacks skips the row."""
        try:
            device = accelerator(self.gpu)
        except InputError as error:
            raise SkippedError(f"gpu {self.gpu[:60]} is not in the catalogue") from error
        base = self._nearest(device)
        per_node, domain = self.gpus_per_node, self.domain
        if domain is None:  # a domain of several nodes is a property of the device's usual cluster
            domain = base.domain if base.domain > base.gpus_per_node else per_node
        if domain < per_node and per_node % domain:
            domain = math.gcd(domain, per_node)
        elif domain > per_node:
            domain = domain // per_node * per_node
        return replace(
            base,
            name=self.gpu,
            accelerator=device,
            nodes=self.nodes,
            gpus_per_node=per_node,
            domain=domain,
            intra=replace(base.intra, bandwidth=self.intra or base.intra.bandwidth),
            inter=replace(base.inter, bandwidth=self.inter or base.inter.bandwidth),
        )

    def _nearest(self, device: Accelerator) -> Cluster:
        """The catalogued cluster to take latencies and efficiencies from: same device, same fabric, nearest links."""
        every = clusters()
        same = [c for c in every if c.accelerator.name == device.name]
        same = same or [c for c in every if c.accelerator.architecture == device.architecture] or list(every)
        named = [c for c in same if self.fabric and c.inter.name.startswith(self.fabric)]

        def distance(cluster: Cluster) -> float:
            pairs = ((self.intra, cluster.intra.bandwidth), (self.inter, cluster.inter.bandwidth))
            return sum(abs(math.log(own / theirs)) for own, theirs in pairs if own)

        return min(named or same, key=distance)


def _bandwidth(row: Fields, name: str) -> float | None:
    """GB/s in the row, bytes/s here."""
    value = row.number(name)
    if not 0 <= value < 1e6:
        raise row.error(f"{name} must be GB/s, from 0 to 1000000, got {value:g}")
    return value * 1e9 or None
