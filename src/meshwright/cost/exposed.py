"""Communication of a step in seconds, and how much of it is exposed: what compute cannot hide.

In: the traffic terms of the ledger, priced on the cluster's links; the seconds of compute beside them; the stack's
overlaps. Out: seconds [n, S] by axis and phase. One rule for every overlap: of T seconds of communication a share that
the stack lets run behind compute may hide, as far as there is compute to hide behind; the hidden part slows that
compute by `contention` (it takes multiprocessors and memory bandwidth: Wang et al. 2022, "Overlap communication with
dependent computation"; Rashidi et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.cost.candidates import Candidates, FloatArray, IntArray
from meshwright.cost.collectives import Network, call_seconds
from meshwright.cost.traffic_layers import expert_stride
from meshwright.cost.traffic_state import data_stride
from meshwright.cost.traffic_term import TrafficTerm
from meshwright.hardware.spec import Cluster
from meshwright.ledger import Collective, Phase

REDUCING = (Collective.ALL_REDUCE, Collective.REDUCE_SCATTER)


@dataclass(frozen=True)
class CommunicationTimes:
    """Seconds of a whole step [n, S]. `forward` and `backward` map tp, cp, ep, pp to time spread over the microbatches;
    `reduction` and `gathering` are the gradients' and parameters' of replicated or ZeRO-1/2 state, once per step;
    `sharded` those of ZeRO-3; `final` what follows the last backward pass: tied embedding, partial sums, norms."""

    forward: dict[str, FloatArray]
    backward: dict[str, FloatArray]
    reduction: FloatArray
    gathering: FloatArray
    sharded: FloatArray
    final: FloatArray


@dataclass(frozen=True)
class Split:
    """A communication time as its exposed part (slow-down included) and its hidden part."""

    exposed: FloatArray
    hidden: FloatArray


AXIS_OF = {"expert_tp": "tp", "expert_dp": "dp"}
"""Axes of the ledger that are accounted with another in the parts of a step."""


def communication_times(
    cluster: Cluster,
    network: Network,
    rank_order: str,
    candidates: Candidates,
    terms: tuple[TrafficTerm, ...],
    shape: tuple[int, int],
) -> CommunicationTimes:
    """Price every term and sum by axis and phase. A receive runs beside the send that it matches: not counted."""
    forward = {axis: np.zeros(shape) for axis in ("tp", "cp", "ep", "pp")}
    backward = {axis: np.zeros(shape) for axis in ("tp", "cp", "ep", "pp")}
    reduction, gathering, sharded, final = (np.zeros(shape) for _ in range(4))
    fully_sharded = (candidates.zero == 3)[:, None]
    for term in terms:
        if term.collective is Collective.RECEIVE:
            continue
        size, stride = term.group_size[:, None], rank_stride(term, candidates, rank_order)[:, None]
        each = call_seconds(term.collective, cluster, network, size, stride, term.bytes_per_call)
        seconds = term.calls * each
        axis = AXIS_OF.get(term.axis, term.axis)
        if term.phase is Phase.OPTIMIZER:
            final += seconds
        elif axis == "dp":
            sharded += np.where(fully_sharded, seconds, 0.0)
            once = np.where(fully_sharded, 0.0, seconds)
            if term.collective in REDUCING:
                reduction += once
            else:
                gathering += once
        elif term.phase is Phase.FORWARD:
            forward[axis] += seconds
        else:
            backward[axis] += seconds
    return CommunicationTimes(forward, backward, reduction, gathering, sharded, final)


def rank_stride(term: TrafficTerm, candidates: Candidates, rank_order: str) -> IntArray:
    """The stride of a term's groups in the rank order of the software. The ledger's own is the default order, in which
    the pipeline lies inside dp; Megatron-core's order puts dp (and the experts over it) inside the pipeline."""
    axes = rank_order.split("-")
    if axes.index("pp") < axes.index("dp"):
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


def hide(seconds: FloatArray, share: FloatArray | float, behind: FloatArray, contention: float) -> Split:
    """The rule of the module: min(share x T, compute) hides."""
    hidden = np.minimum(share * seconds, behind)
    return Split(seconds - (1.0 - contention) * hidden, hidden)
