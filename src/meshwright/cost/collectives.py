"""Seconds of one collective call on a cluster's links: latency-bandwidth ("alpha-beta") models of ring, tree and
hierarchical algorithms (Thakur, Rabenseifner, Gropp 2005; NCCL's tuning model).

In: the collective, the group's size and stride between its members, bytes per call, all arrays. Out: seconds per call.
A group lies partly inside the fast domain: `members` of its ranks share one domain, the rest is reached over the
network. Bytes follow ledger.py: the larger of a rank's two buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.candidates import FloatArray, IntArray
from meshwright.hardware.spec import Cluster
from meshwright.hardware.topology import members_per_domain
from meshwright.ledger import Collective


@dataclass(frozen=True)
class Network:
    """Constants of the collective library and the fabric that no link sheet prints (data/devices.toml, [network])."""

    call_s: float = 6e-6  # start of one collective kernel
    intra_hop_s: float = 0.0  # added to the link's own latency per ring hop: flags and copies of the protocol
    inter_hop_s: float = 0.0
    leaf_nodes: int = 32  # nodes under one first-level switch group; oversubscription applies beyond it
    congestion: float = 0.03  # growth of network transfer time per doubling of the domains a group spans
    all_to_all_efficiency: float = 0.7  # of network bandwidth, relative to a ring's: many small peers
    half_bytes: float = 0.0  # per-rank message at which a link reaches half of its bandwidth


@dataclass(frozen=True)
class Span:
    """How a group lies over the domains: arrays of one shape."""

    size: FloatArray
    members: FloatArray  # ranks of the group that share a domain
    domains: FloatArray
    intra_s_per_byte: float
    inter_s_per_byte: FloatArray


def span(cluster: Cluster, network: Network, group_size: IntArray, rank_stride: IntArray) -> Span:
    """Where the members lie, and the price of a byte on each link.

    Oversubscription divides the share of traffic that leaves the first switch level; congestion grows with the
    logarithm of the domains spanned (flow collisions on multi-path fabrics).
    """
    members = members_per_domain(cluster, group_size, rank_stride)
    size = np.maximum(group_size, 1).astype(np.float64)
    domains = np.ceil(size / members)
    inter = cluster.inter
    reach_nodes = size * rank_stride / cluster.gpus_per_node
    beyond = np.clip(1.0 - network.leaf_nodes / np.maximum(reach_nodes, 1e-9), 0.0, 1.0)
    slow = 1.0 + (cluster.oversubscription - 1.0) * beyond
    slow = slow * (1.0 + network.congestion * np.log2(np.maximum(domains, 1.0)))
    return Span(
        size=size,
        members=members.astype(np.float64),
        domains=domains,
        intra_s_per_byte=1.0 / (cluster.intra.bandwidth * cluster.intra.efficiency),
        inter_s_per_byte=slow / (inter.bandwidth * inter.efficiency),
    )


def call_seconds(
    collective: Collective,
    cluster: Cluster,
    network: Network,
    group_size: IntArray,
    rank_stride: IntArray,
    bytes_per_call: FloatArray,
    copies: float = 1.0,
) -> FloatArray:
    """Seconds of one call; 0 where the group is a single rank or nothing is moved. Arrays broadcast.

    `copies` > 1: an all-to-all of tokens, each to that many experts, sends a domain only one copy of a token."""
    where = span(cluster, network, group_size, rank_stride)
    intra_hop_s = cluster.intra.latency_s + network.intra_hop_s
    inter_hop_s = cluster.inter.latency_s + network.inter_hop_s
    if collective in (Collective.SEND, Collective.RECEIVE):
        seconds = _point_to_point(where, intra_hop_s, inter_hop_s, bytes_per_call)
    elif collective is Collective.ALL_TO_ALL:
        seconds = _all_to_all(where, intra_hop_s, inter_hop_s, network.all_to_all_efficiency, bytes_per_call, copies)
    elif collective is Collective.ALL_REDUCE:
        ring = _ring(where, intra_hop_s, inter_hop_s, 2.0, bytes_per_call)
        tree = _tree(where, intra_hop_s, inter_hop_s, bytes_per_call)
        seconds = np.minimum(ring, tree)
    else:
        seconds = _ring(where, intra_hop_s, inter_hop_s, 1.0, bytes_per_call)
    busy = (where.size > 1) & (bytes_per_call > 0)
    return np.where(busy, seconds + network.call_s, 0.0)


def _ring(where: Span, intra_hop_s: float, inter_hop_s: float, rounds: float, nbytes: FloatArray) -> FloatArray:
    """Ring: per round (g - 1) steps, each a start and n/g bytes over the slowest link (Thakur et al. 2005, sections 4.1
    and 4.4); all-reduce is two rounds (reduce-scatter, all-gather). Members of one domain drive their NICs in parallel
    rings. Every link forwards g - 1 chunks one after another, so each step pays the slowest hop's latency."""
    g = where.size
    per_byte = np.where(
        where.domains > 1,
        np.maximum(where.intra_s_per_byte, where.inter_s_per_byte / where.members),
        where.intra_s_per_byte,
    )
    hops = (g - 1) * np.where(where.domains > 1, inter_hop_s, intra_hop_s)
    return rounds * (hops + (g - 1) / g * nbytes * per_byte)


def _tree(where: Span, intra_hop_s: float, inter_hop_s: float, nbytes: FloatArray) -> FloatArray:
    """Double binary tree over the domains, chain inside each (NCCL): reduce up, broadcast down. Every rank handles
    each byte twice, so the bandwidth term lacks the ring's (g - 1)/g; the latency is logarithmic."""
    per_byte = np.where(
        where.domains > 1,
        np.maximum(where.intra_s_per_byte, where.inter_s_per_byte / where.members),
        where.intra_s_per_byte,
    )
    hops = (where.members - 1) * intra_hop_s + np.ceil(np.log2(where.domains)) * inter_hop_s
    return 2.0 * (hops + nbytes * per_byte)


def _all_to_all(
    where: Span, intra_hop_s: float, inter_hop_s: float, efficiency: float, nbytes: FloatArray, copies: float
) -> FloatArray:
    """Pairwise exchange: n/g to each peer, peers in the domain and peers beyond it served at the same time.

    With k copies of a token spread over D domains, D (1 - (1 - 1/D)^k) domains get one on average; where a domain
    forwards among its own (DeepSeek-AI 2024, section 3.2.2), only that many cross the network instead of k.
    """
    g = where.size
    crossing = where.domains * (1.0 - (1.0 - 1.0 / where.domains) ** copies) / copies
    inside = intra_hop_s + (where.members - 1) / g * nbytes * where.intra_s_per_byte
    outside = inter_hop_s + (g - where.members) / g * nbytes * crossing * where.inter_s_per_byte / efficiency
    return np.where(where.domains > 1, np.maximum(inside, outside), inside)


def _point_to_point(where: Span, intra_hop_s: float, inter_hop_s: float, nbytes: FloatArray) -> FloatArray:
    """A message between neighbours: over the network where any neighbours of the group lie in different domains."""
    return np.where(
        where.domains > 1,
        inter_hop_s + nbytes * where.inter_s_per_byte,
        intra_hop_s + nbytes * where.intra_s_per_byte,
    )


__all__ = ["Network", "Span", "call_seconds", "span"]
