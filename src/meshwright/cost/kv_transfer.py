"""A prompt's KV cache on its way from the replica that read it to the one that continues it.

In: the cache's bytes on the ranks of both replicas, the cluster. Out: seconds of the transfer and what of them nothing
hides. Every decoding rank takes its own heads from the ranks that hold them (vLLM's NixlConnector); of MLA's latent,
which is whole on every tp rank, each takes a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.candidates import FloatArray
from meshwright.cost.collectives import call_seconds
from meshwright.cost.device import network
from meshwright.cost.kv_cache import sequence_cache_bytes
from meshwright.cost.serving_pass import Engine
from meshwright.hardware.spec import Cluster
from meshwright.ledger import Collective


@dataclass(frozen=True)
class CacheShares:
    """Of one sequence's cache [n]: bytes on a rank of the fullest stage, that rank's share of all that its replica
    holds, and bytes that all ranks of a replica hold together."""

    rank_bytes: FloatArray
    rank_share: FloatArray
    replica_bytes: FloatArray


def cache_shares(x: Engine, tokens: float) -> CacheShares:
    """How the cache of `tokens` tokens lies over a replica."""
    c = x.candidates
    per_stage = sequence_cache_bytes(x.model, x.stages, c.tp, np.full(len(c), tokens), x.kv_bytes)
    fullest, together = per_stage.max(axis=1), (per_stage * x.stages.weight).sum(axis=1)
    share = fullest / np.maximum(together, 1e-9) / c.tp
    return CacheShares(fullest, share, together * c.tp)


def transfer_seconds(cluster: Cluster, reader: CacheShares, decoder: CacheShares) -> FloatArray:
    """Seconds of one prompt's transfer for every pair [readers, decoders]: its busiest rank's bytes over one link, that
    of the fast domain only where the whole cluster is one."""
    sent = reader.rank_share[:, None] * decoder.replica_bytes[None, :]
    busiest = np.maximum(sent, decoder.rank_bytes[None, :])
    two, apart = np.array(2), np.array(1 if cluster.gpus <= cluster.domain else cluster.domain)
    return call_seconds(Collective.SEND, cluster, network(fitted=False), two, apart, busiest)


def exposed_seconds(transfer_s: FloatArray, reading_s: FloatArray, layers: int, by_layer: bool) -> FloatArray:
    """What of a transfer the first token waits for: all of it, or, where each layer's cache leaves while the next layer
    is computed (Patel et al. 2024, "Splitwise", section IV-C), the last layer's share or what the link is behind:
    max(T / L, T - D (L - 1) / L), the second machine of a two-machine flow shop of L equal jobs."""
    if not by_layer:
        return transfer_s
    return np.maximum(transfer_s / layers, transfer_s - reading_s * (layers - 1) / layers)
