"""Communication in seconds, and how much of it is exposed: what compute cannot hide.

In: traffic terms of a blueprint's levels. Out: seconds per role [x, R] by axis and phase, on the cluster's links.
One rule for every overlap: of T seconds of communication a share that the stack lets run behind compute may hide, as
far as there is compute to hide behind; the hidden part slows that compute by `contention` (it takes multiprocessors
and memory bandwidth: Rashidi et al. 2021, "Enabling compute-communication overlap in distributed deep learning").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.blueprint import per_role
from meshwright.cost.candidates import Candidates, FloatArray, IntArray
from meshwright.cost.collectives import Network, call_seconds
from meshwright.cost.traffic_layers import expert_stride
from meshwright.cost.traffic_state import data_stride
from meshwright.cost.traffic_term import TrafficTerm
from meshwright.hardware.spec import Cluster
from meshwright.ledger import Collective, Phase

REDUCING = (Collective.ALL_REDUCE, Collective.REDUCE_SCATTER)
SHARDING = (Collective.ALL_GATHER, Collective.REDUCE_SCATTER)
LAYER_AXES = ("tp", "cp", "ep")
AXIS_OF = {"expert_tp": "tp", "expert_dp": "dp"}
"""Axes of the ledger that are accounted with another in the parts of a step."""


@dataclass(frozen=True)
class Wires:
    """What prices a call: the cluster's links, the library's constants, the software's rank order. `copies`: experts
    per token where tokens cross the network once per domain (1: once per expert)."""

    cluster: Cluster
    network: Network
    rank_order: str
    copies: float = 1.0
    shard_messages: float = 1.0  # messages in which ZeRO-3 moves one layer
    piece_copy_s: float = 0.0  # of every rank's piece of such a message

    def seconds(self, term: TrafficTerm, candidates: Candidates) -> FloatArray:
        """All calls of a term [x, S]. ZeRO-3 that moves each tensor by itself pays a call's latency for each, and what
        its software does for every rank's piece."""
        size, stride = term.group_size[:, None], rank_stride(term, candidates, self.rank_order)[:, None]
        pieces: FloatArray | float = 1.0
        copies_s: FloatArray | float = 0.0
        if (self.shard_messages > 1 or self.piece_copy_s > 0) and term.collective in SHARDING:
            sharded = (candidates.zero == 3)[:, None] & (AXIS_OF.get(term.axis, term.axis) == "dp")
            pieces = np.where(sharded, self.shard_messages, 1.0)
            copies_s = self.piece_copy_s * np.where(sharded & (size > 1), size, 0)
        nbytes = term.bytes_per_call / pieces
        copies = self.copies if term.axis == "ep" else 1.0  # heads have one owner each
        each = call_seconds(term.collective, self.cluster, self.network, size, stride, nbytes, copies)
        return term.calls * pieces * (each + copies_s)


def layer_communication(
    wires: Wires, rows: Candidates, terms: tuple[TrafficTerm, ...], roles: int
) -> dict[tuple[str, Phase], FloatArray]:
    """Seconds per role and microbatch [u, R] of tp, cp and ep, forward and backward. A receive runs beside the send
    that it matches: not counted."""
    found = {(axis, phase): np.zeros((len(rows), roles)) for axis in LAYER_AXES for phase in Phase}
    for term in terms:
        if term.collective is not Collective.RECEIVE and term.used:
            found[AXIS_OF.get(term.axis, term.axis), term.phase] += wires.seconds(term, rows)
    return {key: per_role(seconds) for key, seconds in found.items()}


def boundary_communication(
    wires: Wires, rows: Candidates, terms: tuple[TrafficTerm, ...]
) -> tuple[FloatArray, FloatArray]:
    """Seconds of one message over a stage boundary [b], forward and backward."""
    sent = {t.phase: wires.seconds(t, rows)[:, 0] for t in terms if t.collective is Collective.SEND}
    return sent[Phase.FORWARD], sent[Phase.BACKWARD]


@dataclass(frozen=True)
class StateCommunication:
    """Seconds per role [d, R] of one gradient reduction, one gathering of parameters (ZeRO-3: forward and backward),
    and of what follows the last backward pass: tied embedding, partial sums, norms."""

    reduction: FloatArray
    gathering: FloatArray
    final: FloatArray


def state_communication(
    wires: Wires, rows: Candidates, terms: tuple[TrafficTerm, ...], roles: int
) -> StateCommunication:
    """Price parameters and gradients."""
    reduction, gathering, final = (np.zeros((len(rows), roles)) for _ in range(3))
    for term in terms:
        if not term.used:
            continue
        if term.phase is Phase.OPTIMIZER:
            final += wires.seconds(term, rows)
        elif term.collective in REDUCING:
            reduction += wires.seconds(term, rows)
        else:
            gathering += wires.seconds(term, rows)
    return StateCommunication(per_role(reduction), per_role(gathering), per_role(final))


def rank_stride(term: TrafficTerm, candidates: Candidates, rank_order: str) -> IntArray:
    """The stride of a term's groups in the rank order of the software. The ledger's own is the default order, in which
    the pipeline lies inside dp; Megatron-core's order puts dp (and the experts over it) inside the pipeline."""
    axes = rank_order.split("-")
    if "pp" not in axes or axes.index("pp") < axes.index("dp"):
        return term.rank_stride
    c = candidates
    if term.axis in ("pp", "embedding"):
        return term.rank_stride * c.dp
    if term.axis == "ep":
        return c.expert_tp
    if term.axis == "dp":
        return term.rank_stride // data_stride(c) * c.tp
    if term.axis == "expert_dp":
        return term.rank_stride // np.where(c.expert_dp > 1, c.ep * expert_stride(c), 1) * c.ep * c.expert_tp
    return term.rank_stride


def hide(
    seconds: FloatArray, share: FloatArray | float, behind: FloatArray, contention: float
) -> tuple[FloatArray, FloatArray]:
    """(exposed, hidden) by the rule of the module: min(share x T, compute) hides, and costs `contention` of itself."""
    hidden = np.minimum(share * seconds, behind)
    return seconds - (1.0 - contention) * hidden, hidden
