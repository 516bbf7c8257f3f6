"""What has to be priced to time a set of candidates, each thing once: a `Blueprint`.

Costs inside a layer depend on the in-layer setting (*units*), what a stage holds on the pipeline's shape (*shapes*), a
stage's turn on both (*blocks*), state traffic on the mesh and ZeRO (*states*), and so on: far fewer rows than
candidates. In: model, workload, candidates. Out: the distinct rows of every level, the indices between levels, and the
traffic terms of one layer of each kind and of each end. Nothing here depends on a machine's constants.

Costs per stage are linear in what the stage holds: *roles* are one layer of each kind, the first and the last end, both
ends in one, and what every stage does whatever it holds. A stage is a vector of counts over roles.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from meshwright.cost.candidates import (
    SCHEDULES,
    STATE_KNOBS,
    UNIT_COLUMNS,
    Candidates,
    FloatArray,
    IntArray,
    UnitKeys,
    runs,
)
from meshwright.cost.layers import end_memory, layer_memory
from meshwright.cost.memory import stage_parameters, state_bytes
from meshwright.cost.stack import Stack
from meshwright.cost.stages import Stages, role_table, stage_keys
from meshwright.cost.traffic import pipeline_terms
from meshwright.cost.traffic_layers import layer_terms
from meshwright.cost.traffic_state import state_terms
from meshwright.cost.traffic_term import TrafficTerm, scene
from meshwright.cost.workload import Workload
from meshwright.layout.config import Schedule
from meshwright.models.spec import ModelSpec

PLAIN, BUSY, PAIRED = 0, 1, 2
OVERLAP = np.array(
    [{Schedule.ONE_F_ONE_B: PLAIN, Schedule.GPIPE: PLAIN, Schedule.DUALPIPEV: PAIRED}.get(s, BUSY) for s in SCHEDULES]
)
"""What a schedule has at hand to hide communication behind, by its code: the next microbatch alone, other chunks' work,
or the chunk that runs at the same time."""
UNIT_FRAME = tuple(name for name in UNIT_COLUMNS if name not in STATE_KNOBS)
STATE_FRAME = ("tp", "sequence_parallel", "cp", "ep", "expert_tp", "dp", "pp")
"""What the traffic and size of parameters, gradients and optimizer state depend on, beside ZeRO."""


@dataclass(frozen=True)
class Blueprint:
    """Levels, and indices from the finer level to the coarser one.

    units [u], states [d], shapes [p]; blocks [b] = unit x shape x dp; flows [w] = block x schedule x microbatches;
    cells [e] = state x shape; pairs [f] = block x cell; `flow_of` and `pair_of` [n]. `holds` [p, S, R] counts the roles
    of a stage. Traffic terms are [u, R], [d, R] and [b, 1].
    """

    model: ModelSpec
    workload: Workload
    candidates: Candidates
    stages: Stages  # of the shapes [p, S]
    holds: FloatArray
    units: Candidates
    states: Candidates
    blocks: Candidates
    cells: Candidates
    pairs: Candidates
    unit_of_block: IntArray
    shape_of_block: IntArray
    state_of_cell: IntArray
    shape_of_cell: IntArray
    flows: Candidates
    block_of_flow: IntArray
    flow_of: IntArray
    block_of_pair: IntArray
    cell_of_pair: IntArray
    pair_of: IntArray
    unit_terms: tuple[TrafficTerm, ...]
    state_terms: tuple[TrafficTerm, ...]
    pipeline_terms: tuple[TrafficTerm, ...]
    optimizer_bytes: FloatArray  # [e, S]


def blueprint(model: ModelSpec, workload: Workload, candidates: Candidates, stack: Stack) -> Blueprint:
    """Find every distinct thing among the candidates."""
    run = runs(candidates)
    shape = stage_keys(candidates, run)
    shapes = role_table(model, shape)

    def of(*names: str) -> list[IntArray]:
        return [getattr(candidates, name) for name in names]

    unit_row, unit = run.distinct(of(*UNIT_FRAME), of("recompute", "recompute_every"))
    state_row, state = run.distinct(of(*STATE_FRAME), of("zero", "zero_shards"))
    block_row, block = run.distinct([shape.inverse, candidates.dp, candidates.pp, OVERLAP[candidates.schedule]], [unit])
    flow_row, flow = run.distinct(of("schedule", "dp", "micro_batch", "global_batch"), [block])
    cell_row, cell = run.distinct([shape.inverse], [state])
    pair_row, pair = run.distinct([candidates.global_batch], [block, cell])
    units, states = _single_microbatch(candidates.take(unit_row)), _single_microbatch(candidates.take(state_row))
    blocks, cells = _single_microbatch(candidates.take(block_row)), _single_microbatch(candidates.take(cell_row))
    of_units = scene(model, workload, units, _role_stages(model, len(units)), _own(units))
    of_states = scene(model, workload, states, _role_stages(model, len(states)), _own(states))
    of_blocks = scene(model, workload, blocks, _boundary(model, len(blocks)), _own(blocks))
    return Blueprint(
        model=model,
        workload=workload,
        candidates=candidates,
        stages=shapes,
        holds=_holdings(shapes),
        units=units,
        states=states,
        blocks=blocks,
        cells=cells,
        pairs=candidates.take(pair_row),
        unit_of_block=unit[block_row],
        shape_of_block=shape.inverse[block_row],
        state_of_cell=state[cell_row],
        shape_of_cell=shape.inverse[cell_row],
        flows=candidates.take(flow_row),
        block_of_flow=block[flow_row],
        flow_of=flow,
        block_of_pair=block[pair_row],
        cell_of_pair=cell[pair_row],
        pair_of=pair,
        unit_terms=tuple(layer_terms(of_units)),
        state_terms=tuple(state_terms(of_states)),
        pipeline_terms=tuple(pipeline_terms(of_blocks)),
        optimizer_bytes=_optimizer_bytes(model, workload, stack, cells, shapes.take(shape.inverse[cell_row])),
    )


def _single_microbatch(rows: Candidates) -> Candidates:
    """The rows with one microbatch per step, so that terms per microbatch and per step can be told apart."""
    return replace(rows, global_batch=rows.dp * rows.micro_batch)


def _own(rows: Candidates) -> UnitKeys:
    return UnitKeys(rows, np.arange(len(rows)))


def _role_stages(model: ModelSpec, n: int) -> Stages:
    """A stage per role: K layer kinds, first end, last end, both ends, nothing."""
    kinds = len(model.kinds)
    layers = np.zeros((kinds + 4, kinds), dtype=np.int64)
    layers[:kinds] = np.eye(kinds, dtype=np.int64)
    role = np.arange(kinds + 4)
    first, last = np.isin(role, (kinds, kinds + 2)), np.isin(role, (kinds + 1, kinds + 2))
    nothing = np.zeros(kinds + 4, dtype=np.int64)
    return _repeated(Stages(role, np.ones_like(role), layers, first, last, nothing, nothing), n)


def _boundary(model: ModelSpec, n: int) -> Stages:
    """One stage that sends and receives over one boundary and holds nothing."""
    one, no = np.ones(1, dtype=np.int64), np.zeros(1, dtype=np.bool_)
    layers = np.zeros((1, len(model.kinds)), dtype=np.int64)
    return _repeated(Stages(one - 1, one, layers, no, no, one, one), n)


def _repeated(stage: Stages, n: int) -> Stages:
    """The same stages for n rows, without copying."""
    return Stages(**{f.name: np.broadcast_to(v := getattr(stage, f.name), (n, *v.shape)) for f in fields(Stages)})


def _holdings(shapes: Stages) -> FloatArray:
    """Counts over roles of every stage [p, S, K + 4]. Everything counts the empty role once; `per_role` takes it out of
    the other roles."""
    both = shapes.first & shapes.last
    ends = [shapes.first & ~both, shapes.last & ~both, both, np.ones_like(both)]
    return np.concatenate([shapes.layers, np.stack(ends, axis=2)], axis=2).astype(np.float64)


def per_role(seconds: FloatArray) -> FloatArray:
    """Costs of probe stages [x, R] as costs of roles: what the empty stage costs too is taken out of every other."""
    return np.concatenate([seconds[:, :-1] - seconds[:, -1:], seconds[:, -1:]], axis=1)


def _optimizer_bytes(
    model: ModelSpec, workload: Workload, stack: Stack, cells: Candidates, stages: Stages
) -> FloatArray:
    """Bytes that the optimizer step moves through memory [e, S]: state read and written, its gradients read and its
    weights written (half of one pass over fp32 state), gradients cleared; ZeRO-3 keeps part of the state as
    parameters."""
    keys = _own(cells)
    dense, expert = stage_parameters(
        stages, layer_memory(model, workload, cells, stack), end_memory(model, workload, cells, stack), keys.inverse
    )
    state = state_bytes(workload, cells, stack)
    sharded = cells.zero == 3

    def moved(kind: int) -> FloatArray:
        held = np.where(sharded, 2.0 * state.parameters[kind], 0.0)
        return (2.5 * state.optimizer[kind] + state.gradients[kind] + held)[:, None]

    return dense * moved(0) + expert * moved(1)
