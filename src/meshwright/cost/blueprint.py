"""What has to be priced to time a set of candidates, each thing once: a `Blueprint`.

Costs inside a layer depend on the in-layer setting (*units*), what a stage holds on the pipeline's shape (*shapes*), a
stage's turn on both (*blocks*), state traffic on the mesh and ZeRO (*states*), and so on: far fewer rows than
candidates. In: model, workload, candidates. Out: the distinct rows of every level, the indices between levels, and the
traffic terms of one layer of each kind and of each end. Nothing here depends on a machine's constants.

Costs per stage are linear in what the stage holds: *roles* are one layer of each kind, the first and the last end, both
ends in one, and what every stage does whatever it holds. A stage is a vector of counts over roles.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np

from meshwright.cost.candidates import (
    SCHEDULES,
    UNIT_FRAME,
    Candidates,
    Chunk,
    FloatArray,
    IntArray,
    UnitKeys,
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
STATE_FRAME = ("tp", "sequence_parallel", "cp", "ep", "expert_tp", "dp", "pp")
"""What the traffic and size of parameters, gradients and optimizer state depend on, beside ZeRO."""


@dataclass(frozen=True)
class Blueprint:
    """Levels, and indices from the finer level to the coarser one.

    units [u], states [d], shapes [p]; blocks [b] = unit x shape x schedule x dp x global batch; cells [e] = state x
    shape; `block_of` and `cell_of` [n]. Blocks and cells lie shape after shape. `holds` [p, S, R] counts the roles of a
    stage. Traffic terms are [u, R], [d, R] and [b, 1].
    """

    model: ModelSpec
    workload: Workload
    stack: Stack
    chunk: Chunk  # of the candidates [n]
    zero: IntArray  # [n]
    stages: Stages  # of the shapes [p, S]
    holds: FloatArray
    units: Candidates
    states: Candidates
    blocks: Candidates
    cells: Candidates
    unit_of_block: IntArray
    shape_of_block: IntArray
    state_of_cell: IntArray
    shape_of_cell: IntArray
    block_of: IntArray
    cell_of: IntArray
    unit_terms: tuple[TrafficTerm, ...]
    pipeline_terms: tuple[TrafficTerm, ...]

    @cached_property
    def state_terms(self) -> tuple[TrafficTerm, ...]:
        """Traffic of parameters and gradients: a lower bound never asks."""
        states = self.states
        of_states = scene(self.model, self.workload, states, _role_stages(self.model, len(states)), _own(states))
        return tuple(state_terms(of_states))

    @cached_property
    def optimizer_bytes(self) -> FloatArray:
        """Bytes that the optimizer step moves through memory [e, S]."""
        stages = self.stages.take(self.shape_of_cell)
        return _optimizer_bytes(self.model, self.workload, self.stack, self.cells, stages)

    @cached_property
    def candidates(self) -> Candidates:
        """The candidates as rows of their own: a search never asks."""
        return self.chunk.take(np.arange(len(self.chunk)))


def blueprint(model: ModelSpec, workload: Workload, candidates: Candidates, stack: Stack) -> Blueprint:
    """Find every distinct thing among the candidates."""
    return blueprint_of(model, workload, Chunk.of(candidates), stack)


def blueprint_of(model: ModelSpec, workload: Workload, chunk: Chunk, stack: Stack) -> Blueprint:
    """Find every distinct thing among the rows of a chunk."""
    heads = chunk.heads
    shape = stage_keys(heads)
    shapes, shape_of = role_table(model, shape), shape.inverse

    def of(*names: str) -> list[IntArray]:
        return [getattr(heads, name) for name in names]

    def shape_at(rows: IntArray) -> IntArray:
        return shape_of.take(chunk.of_row.take(rows))

    unit_row, unit = chunk.distinct(of(*UNIT_FRAME), chunk.saving)
    state_row, state = chunk.distinct(of(*STATE_FRAME), chunk.sharding)
    of_unit, of_state = (unit, len(unit_row)), (state, len(state_row))
    block_row, block = chunk.distinct([shape_of, *of("schedule", "dp", "pp", "global_batch")], of_unit)
    cell_row, cell = chunk.distinct([shape_of], of_state)
    units, states = _single_microbatch(chunk.take(unit_row)), _single_microbatch(chunk.take(state_row))
    blocks, cells = chunk.take(block_row), _single_microbatch(chunk.take(cell_row))
    of_units = scene(model, workload, units, _role_stages(model, len(units)), _own(units))
    of_blocks = scene(model, workload, _single_microbatch(blocks), _boundary(model, len(blocks)), _own(blocks))
    return Blueprint(
        model=model,
        workload=workload,
        stack=stack,
        chunk=chunk,
        zero=chunk.candidates.zero.take(chunk.rows),
        stages=shapes,
        holds=_holdings(shapes),
        units=units,
        states=states,
        blocks=blocks,
        cells=cells,
        unit_of_block=unit[block_row],
        shape_of_block=shape_at(block_row),
        state_of_cell=state[cell_row],
        shape_of_cell=shape_at(cell_row),
        block_of=block,
        cell_of=cell,
        unit_terms=tuple(layer_terms(of_units)),
        pipeline_terms=tuple(pipeline_terms(of_blocks)),
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


def stage_sums(holds: FloatArray, shape_of: IntArray, thing_of: IntArray, table: FloatArray) -> FloatArray:
    """What every stage of x rows costs [Q, S, x]: the sum over the roles that it holds of the costs of a role.

    Row i has the shape `shape_of[i]` of `holds` [p, S, R], shape after shape, and the costs `table[:, :, thing_of[i]]`
    of [R, Q, y]. One product of matrices per shape: a small one per row would cost several times as much.
    """
    roles, quantities, _ = table.shape
    sums = np.empty((holds.shape[1], quantities, len(shape_of)))
    edges = np.searchsorted(shape_of, np.arange(len(holds) + 1))
    for held, (start, stop) in zip(holds, itertools.pairwise(edges), strict=True):
        costs = table.take(thing_of[start:stop], axis=2).reshape(roles, -1)
        sums[:, :, start:stop] = (held @ costs).reshape(len(held), quantities, -1)
    return sums.transpose(1, 0, 2)


def _optimizer_bytes(
    model: ModelSpec, workload: Workload, stack: Stack, cells: Candidates, stages: Stages
) -> FloatArray:
    """Bytes of an optimizer step [e, S]: state read and written, its gradients read and its
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
