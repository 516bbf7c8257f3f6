"""The traffic ledger in closed form: what every rank of every stage sends in one training step, per axis, collective,
phase and subject.

In: model, workload, candidates with their stages. Out: `TrafficTerm`s, arrays over candidates and stages. It predicts
exactly what meshwright's runtime does; docs/ledger.md states the conventions, ledger.py what the bytes of a call are.
The terms of each axis are in cost.traffic_layers (inside layers), cost.traffic_state (parameters and gradients),
cost.traffic_balance (the load-balancing loss).
"""

from __future__ import annotations

import numpy as np

from meshwright.cost.candidates import Candidates, UnitKeys, unit_keys
from meshwright.cost.stages import Stages, every_stage
from meshwright.cost.traffic_balance import balance_terms
from meshwright.cost.traffic_layers import layer_terms
from meshwright.cost.traffic_state import state_terms
from meshwright.cost.traffic_term import RankPlace, Scene, TrafficTerm, scene
from meshwright.cost.workload import Workload
from meshwright.layout.config import HybridParallelConfig
from meshwright.ledger import Collective, Phase, TrafficEntry
from meshwright.models.spec import ModelSpec

__all__ = ["RankPlace", "TrafficTerm", "ledger_entries", "pipeline_terms", "rank_ledger", "training_traffic"]


def training_traffic(
    model: ModelSpec,
    workload: Workload,
    candidates: Candidates,
    stages: Stages,
    keys: UnitKeys,
    place: RankPlace | None = None,
) -> tuple[TrafficTerm, ...]:
    """Every line of the ledger for every candidate and stage; lines that no candidate has are left out. Exact to the
    byte for the rank at `place` of a stage; without one, rows are spread evenly over shards."""
    x = scene(model, workload, candidates, stages, keys, place)
    terms = [*layer_terms(x), *pipeline_terms(x), *state_terms(x), *balance_terms(x)]
    return tuple(t for t in terms if t.used)


def pipeline_terms(x: Scene) -> list[TrafficTerm]:
    """Activations [micro batch, seq/cp (/tp under sequence parallelism), hidden] cross each boundary between chunks on
    different stages, and their gradients come back (Narayanan et al. 2021, section 2.2)."""
    c = x.candidates
    boundary = x.hidden_bytes * x.model.residual_streams * np.where(c.sequence_parallel, 1.0 / c.tp, 1.0)
    forward, backward = x.stages.sends * x.microbatches[:, None], x.stages.receives * x.microbatches[:, None]
    stride = c.cp * c.tp
    return [
        x.term("pp", Collective.SEND, Phase.FORWARD, "stage output", c.pp, stride, forward, boundary),
        x.term("pp", Collective.RECEIVE, Phase.FORWARD, "stage input", c.pp, stride, backward, boundary),
        x.term("pp", Collective.SEND, Phase.BACKWARD, "stage input gradient", c.pp, stride, backward, boundary),
        x.term("pp", Collective.RECEIVE, Phase.BACKWARD, "stage output gradient", c.pp, stride, forward, boundary),
    ]


def rank_ledger(
    model: ModelSpec, workload: Workload, config: HybridParallelConfig, stage: int, place: RankPlace
) -> tuple[TrafficEntry, ...]:
    """The ledger of one rank of one configuration, to the byte: `stage` is its pp rank."""
    candidates = Candidates.from_configs([config])
    terms = training_traffic(model, workload, candidates, every_stage(model, config), unit_keys(candidates), place)
    return ledger_entries(terms, 0, stage)


def ledger_entries(terms: tuple[TrafficTerm, ...], row: int, role: int) -> tuple[TrafficEntry, ...]:
    """The ledger lines of one candidate's rank on the stage of a role; lines without calls are left out. Terms of
    several kinds of layers are one line."""
    totals: dict[tuple[str, Collective, Phase, str, int], tuple[float, float]] = {}
    for term in terms:
        calls = float(term.calls[row, role])
        if term.group_size[row] > 1 and calls > 0:
            line = (term.axis, term.collective, term.phase, term.what, int(term.group_size[row]))
            before = totals.get(line, (0.0, 0.0))
            totals[line] = (before[0] + calls, before[1] + calls * float(term.bytes_per_call[row, role]))
    entries = [TrafficEntry(*line, round(calls), round(total)) for line, (calls, total) in totals.items()]
    return tuple(sorted(entries, key=lambda e: (e.axis, e.phase, e.collective, e.what)))
