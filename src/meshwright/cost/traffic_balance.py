"""Ledger lines of the load-balancing loss of routers, for models whose config asks for it (`output_router_logits`).

In: a scene. Out: its terms: the sums over the ranks that share tokens, what travels beside the pipeline's messages, and
the token count that it needs beforehand. At most a few KiB each, so that they are booked but not priced.
"""

from __future__ import annotations

import numpy as np

from meshwright.cost.traffic_state import SCALAR_BYTES, data_stride
from meshwright.cost.traffic_term import Scene, TrafficTerm
from meshwright.ledger import Collective, Phase

BALANCE = "router balance"
SUM_BYTES = 8.0  # sums are fp64


def balance_terms(x: Scene) -> list[TrafficTerm]:
    """[2, experts + 1] sums: of tokens and probabilities per expert, and a column that counts rows."""
    experts = x.model.balanced_experts
    if not experts:
        return []
    c = x.candidates
    sums = np.full(len(c), 2 * SUM_BYTES * (experts + 1))
    each = x.microbatches[:, None]
    out, back, stride = x.stages.sends * each, x.stages.receives * each, c.cp * c.tp
    send, receive, reduce = Collective.SEND, Collective.RECEIVE, Collective.ALL_REDUCE
    once, count, beside = np.ones((len(c), 1)), np.full(len(c), SCALAR_BYTES), (BALANCE, c.pp, stride)
    return [
        x.term("tp_cp", reduce, Phase.FORWARD, BALANCE, c.tp * c.cp, np.ones_like(c.tp), x.stages.last * each, sums),
        x.term("pp", send, Phase.FORWARD, *beside, out, sums),
        x.term("pp", receive, Phase.FORWARD, *beside, back, sums),
        x.term("pp", send, Phase.BACKWARD, *beside, back, sums),
        x.term("pp", receive, Phase.BACKWARD, *beside, out, sums),
        x.term("dp", reduce, Phase.FORWARD, "token count", c.dp * c.cp, data_stride(c), once, count),
    ]
