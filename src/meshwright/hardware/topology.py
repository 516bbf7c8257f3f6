"""Which link a group of ranks crosses, as array arithmetic over many groups at once.

A group is `size` ranks at a constant `stride` in rank space (or two such levels: a group of groups). Ranks fill
devices in order, node after node. Out: how many members share a fast domain, and so whether the group leaves it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meshwright.hardware.spec import Cluster, Link

IntArray = NDArray[np.int64]


def segment(cluster: Cluster, gpus: int | None = None) -> int:
    """Devices of one fast domain that a job uses (of all devices of the cluster, or of `gpus`).

    A job larger than one domain takes an equal number of whole nodes from each, so that groups do not straddle two:
    64 of the 72 devices of an NVL72 for 256 devices (what Slurm's block topology and its --segment option arrange).
    """
    gpus = cluster.gpus if gpus is None else gpus
    if gpus <= cluster.domain or cluster.domain <= cluster.gpus_per_node:
        return min(cluster.domain, gpus)
    step = cluster.gpus_per_node
    equal = (s for s in range(step, cluster.domain + 1, step) if gpus % s == 0)
    return max(equal, default=cluster.domain)


def members_sharing(reach: int, size: ArrayLike, stride: ArrayLike) -> IntArray:
    """Members of each group that share a block of `reach` consecutive ranks.

    Where a group straddles blocks unevenly it is the largest equal share: the number by which a hierarchical
    algorithm can divide it.
    """
    size, stride = np.asarray(size, dtype=np.int64), np.asarray(stride, dtype=np.int64)
    return np.where(stride < reach, np.gcd(size, np.maximum(reach // stride, 1)), 1)


def members_per_domain(cluster: Cluster, size: ArrayLike, stride: ArrayLike) -> IntArray:
    """Consecutive members of each group inside one fast domain (= size: it never leaves the domain)."""
    return members_sharing(segment(cluster), size, stride)


def members_per_domain_nested(
    cluster: Cluster, size: ArrayLike, stride: ArrayLike, outer_size: ArrayLike, outer_stride: ArrayLike
) -> IntArray:
    """As `members_per_domain` for groups of `outer_size` blocks, `outer_stride` apart, of `size` ranks at `stride`:
    dp x cp around a pipeline, or experts spread over several dp replicas."""
    inner = members_per_domain(cluster, size, stride)
    outer = members_per_domain(cluster, outer_size, outer_stride)
    return np.where(inner == np.asarray(size, dtype=np.int64), inner * outer, inner)


def stays_inside(cluster: Cluster, size: ArrayLike, stride: ArrayLike) -> NDArray[np.bool_]:
    """Whether each group lies within one fast domain."""
    return members_per_domain(cluster, size, stride) == np.asarray(size, dtype=np.int64)


def link_of_group(cluster: Cluster, ranks: Sequence[int]) -> Link:
    """The slowest link that a group given by its ranks crosses."""
    domains = np.unique(np.asarray(ranks, dtype=np.int64) // segment(cluster))
    return cluster.intra if len(domains) <= 1 else cluster.inter
