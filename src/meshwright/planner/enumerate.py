"""Every legal configuration of a model on a fixed number of GPUs with a fixed global batch, as Candidates arrays.

A `Space` holds *frames* (mesh, experts, sequence parallel, micro batch), checked against `layout.validate`, with the
*schedules* (schedule and vpp) and *states* (ZeRO stage and shards, recompute) that each may run with, and expands them
chunk by chunk. Rows that are the same program under another name are listed once: at pp = 1 all schedules are 1F1B, at
dp * cp = 1 all ZeRO stages are stage 0.

Left out unless the user names them (never because of a guess about speed alone, and always said in `Space.notes`):
context-parallel sizes that leave a rank fewer than MIN_TOKENS_PER_CP_RANK tokens of a sequence (unless nothing else is
legal); expert_tp other than 1
and tp; virtual stages that do not divide the layers of a stage; HSDP shards other than one and eight fast domains;
recompute strides other than 1, 2 and 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from meshwright.cost.candidates import RECOMPUTES, SCHEDULES, BoolArray, Candidates, IntArray, distinct
from meshwright.errors import InputError
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import Precision, Recompute, Schedule
from meshwright.layout.rules import ClusterFacts
from meshwright.layout.validate import legal_mask
from meshwright.models.spec import Attention, LinearMixer, ModelSpec, MoeMlp
from meshwright.planner.constraints import Constraints
from meshwright.planner.legality import model_facts
from meshwright.planner.table import Options, Table, column, divisors, join, keep, product, rows

MIN_TOKENS_PER_CP_RANK = 4096
"""Megatron Core's MoE guide: "empirically, use CP when sequence length >= 8K", that is two ranks of this many."""
RECOMPUTE_STRIDES = (1, 2, 4)
HSDP_DOMAINS = (1, 8)
CHUNK_ROWS = 131_072
FRAME = ("dp", "tp", "pp", "cp", "ep", "expert_tp", "micro_batch")
COLUMNS = (*FRAME, "vpp", "schedule", "zero", "zero_shards", "recompute", "recompute_every")


@dataclass(frozen=True)
class Space:
    """All configurations to try: every frame with each of its schedules and each of its states. `lean_states` are the
    states that need least memory: no state of a frame fits where none of these does."""

    frames: Table
    schedules: Options
    states: Options
    lean_states: Options
    precision: Precision
    global_batch: int
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> IntArray:
        """Configurations of every frame."""
        return self.schedules.counts * self.states.counts

    def __len__(self) -> int:
        return int(self.counts.sum())

    def take(self, frames: IntArray | BoolArray) -> Space:
        """The chosen frames, in the order given."""
        return replace(
            self,
            frames=keep(self.frames, frames),
            schedules=self.schedules.take(frames),
            states=self.states.take(frames),
            lean_states=self.lean_states.take(frames),
        )

    @property
    def lean(self) -> Space:
        """The frames with their lean states alone."""
        return replace(self, states=self.lean_states)

    def by_schedule(self) -> Space:
        """The same configurations with a frame for every schedule."""
        frame, schedule = self.schedules.expand(np.arange(len(self.schedules.code)))
        frames = {name: values[frame] for name, values in self.frames.items()} | schedule
        return replace(
            self,
            frames=frames,
            schedules=Options.one(len(frame)),
            states=self.states.take(frame),
            lean_states=self.lean_states.take(frame),
        )

    def chunks(self, chunk_rows: int = CHUNK_ROWS) -> Iterator[tuple[int, Candidates]]:
        """The configurations in order, about `chunk_rows` at a time, each chunk with its first frame."""
        ends = np.cumsum(self.counts)
        start = 0
        while start < len(ends):
            done = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, done + chunk_rows, side="right")))
            if ends[stop - 1] > done:
                yield start, self._expanded(np.arange(start, stop))
            start = stop

    def _expanded(self, frames: IntArray) -> Candidates:
        scheduled, schedule = self.schedules.expand(frames)
        position, state = self.states.expand(frames[scheduled])
        frame = frames[scheduled[position]]
        table = {name: values[frame] for name, values in self.frames.items()}
        table |= {name: values[position] for name, values in schedule.items()}
        return to_candidates(table | state, self.global_batch, self.precision)


def to_candidates(table: Table, global_batch: int, precision: Precision) -> Candidates:
    """A complete table as Candidates."""
    return Candidates(
        **{name: table[name] for name in COLUMNS},
        sequence_parallel=table["sequence_parallel"].astype(np.bool_),
        global_batch=np.full(rows(table), global_batch, dtype=np.int64),
        heads_exchanged=np.zeros(rows(table), dtype=np.bool_),
        precision=precision,
        splits=None,
    )


def space(
    model: ModelSpec, cluster: Cluster, seq: int, gpus: int, global_batch: int, constraints: Constraints | None = None
) -> Space:
    """Every legal configuration of `gpus` devices of the cluster that runs `global_batch` sequences a step."""
    for name, value in (("seq", seq), ("gpus", gpus), ("global batch", global_batch)):
        if value < 1:
            raise InputError(f"{name} {value} is not a size; give a whole number from 1")
    fixed = constraints or Constraints()
    found = _space(model, cluster, seq, gpus, global_batch, fixed)
    if len(found) or fixed.cp is not None:
        return found
    every_cp = tuple(d for d in divisors(gpus) if d == 1 or seq % (2 * d) == 0)
    widened = _space(model, cluster, seq, gpus, global_batch, replace(fixed, cp=every_cp))
    return replace(widened, notes=("only context parallel over short pieces of a sequence uses all GPUs",))


def _space(model: ModelSpec, cluster: Cluster, seq: int, gpus: int, global_batch: int, fixed: Constraints) -> Space:
    frames = _meshes(model, seq, gpus, global_batch, fixed)
    frames = _with_experts(frames, model, fixed)
    frames = _with_micro_batches(frames, global_batch, fixed)
    frames = keep(frames, _legal(frames, model, cluster, seq, gpus, global_batch))
    if rows(frames) == 0:
        none = Options.none()
        return Space(frames, none, none, none, fixed.precision, global_batch)
    schedules = _schedule_options(frames, model, global_batch, fixed)
    states = _state_options(frames, model, cluster, fixed)
    lean = states.only(states.columns["lean"] > 0)
    found = Space(frames, schedules, states, lean, fixed.precision, global_batch, _notes(seq, gpus, fixed))
    return found.take(found.counts > 0)


def _legal(frames: Table, model: ModelSpec, cluster: Cluster, seq: int, gpus: int, global_batch: int) -> BoolArray:
    """Which frames obey the rules of layout under plain 1F1B."""
    one = np.ones(rows(frames), dtype=np.int64)
    return legal_mask(
        model_facts(model, seq),
        ClusterFacts(gpus, cluster.gpus_per_node),
        dp=frames["dp"],
        tp=frames["tp"],
        pp=frames["pp"],
        cp=frames["cp"],
        ep=frames["ep"],
        expert_tp=frames["expert_tp"],
        micro_batch=frames["micro_batch"],
        vpp=one,
        schedule=one * SCHEDULES.index(Schedule.ONE_F_ONE_B),
        global_batch=one * global_batch,
        sequence_parallel=frames["sequence_parallel"] > 0,
    )


def _meshes(model: ModelSpec, seq: int, gpus: int, global_batch: int, fixed: Constraints) -> Table:
    """tp x pp x cp x dp with product `gpus`; dp divides the global batch."""
    sizes = divisors(gpus)
    heads = max((k.mixer.heads for k in model.kinds if isinstance(k.mixer, Attention | LinearMixer)), default=gpus)
    mesh = product(
        tp=column(fixed.values("tp", [d for d in sizes if d <= heads])),
        pp=column(fixed.values("pp", [d for d in sizes if d <= model.num_layers])),
        cp=column(fixed.values("cp", context_sizes(seq, gpus))),
    )
    replica = mesh["tp"] * mesh["pp"] * mesh["cp"]
    mesh["dp"] = gpus // replica
    mask = (gpus % replica == 0) & (replica <= gpus)
    mesh = keep(mesh, mask)
    mask = global_batch % mesh["dp"] == 0
    if fixed.dp is not None:
        mask &= np.isin(mesh["dp"], column(fixed.dp))
    return keep(mesh, mask)


def context_sizes(seq: int, gpus: int) -> list[int]:
    """Context-parallel sizes worth enumerating: at least MIN_TOKENS_PER_CP_RANK tokens a rank, in balanced pairs."""
    most = max(1, seq // MIN_TOKENS_PER_CP_RANK)
    return [d for d in divisors(gpus) if d == 1 or (d <= most and seq % (2 * d) == 0)]


def _with_experts(mesh: Table, model: ModelSpec, fixed: Constraints) -> Table:
    """ep x expert_tp within the dp * cp * tp ranks of a stage."""
    experts = max((k.mlp.experts for k in model.kinds if isinstance(k.mlp, MoeMlp)), default=1)
    if experts == 1:
        ones = np.ones(rows(mesh), dtype=np.int64)
        allowed = 1 in fixed.values("ep", [1]) and 1 in fixed.values("expert_tp", [1])
        return keep({**mesh, "ep": ones, "expert_tp": ones}, ones * allowed > 0)

    def expert_tensor_sizes(tp: int) -> Table:
        return {"expert_tp": column(fixed.values("expert_tp", sorted({1, tp})))}

    def expert_sizes(ranks: int) -> Table:
        return {"ep": column(fixed.values("ep", [d for d in divisors(ranks) if experts % d == 0]))}

    table = join(mesh, mesh["tp"], expert_tensor_sizes)
    ranks = table["dp"] * table["cp"] * table["tp"]
    table = keep(table, ranks % table["expert_tp"] == 0)
    ranks = table["dp"] * table["cp"] * table["tp"] // table["expert_tp"]
    table = join(table, ranks, expert_sizes)
    ranks = table["dp"] * table["cp"] * table["tp"]
    return keep(table, ranks % (table["expert_tp"] * table["ep"]) == 0)


def _with_micro_batches(table: Table, global_batch: int, fixed: Constraints) -> Table:
    """Micro batch (a divisor of the replica's batch) and sequence parallel."""

    def micro_batches(batch: int) -> Table:
        sizes = divisors(batch)
        return {"micro_batch": column([b for b in fixed.values("micro_batch", sizes) if b in sizes])}

    def sequence_parallel(tp: int) -> Table:
        choices = [1, 0] if tp > 1 else [0]
        allowed = fixed.sequence_parallel
        return {"sequence_parallel": column([c for c in choices if allowed is None or tp == 1 or bool(c) in allowed])}

    table = join(table, table["tp"], sequence_parallel)
    return join(table, global_batch // table["dp"], micro_batches)


def _schedule_options(frames: Table, model: ModelSpec, global_batch: int, fixed: Constraints) -> Options:
    """Schedules and vpp by pipeline stages and microbatches, those that the rules of layout allow."""
    microbatches = global_batch // (frames["dp"] * frames["micro_batch"])
    base = global_batch + 1

    def options(key: int) -> Table:
        pp, count = divmod(key, base)
        pairs = _schedules(pp, model.num_layers, fixed)
        names = ("schedule", "vpp", "pp", "microbatches")
        return {n: column([(s, v, pp, count)[i] for s, v in pairs]) for i, n in enumerate(names)}

    found = Options.by_key(frames["pp"] * base + microbatches, options)
    table = found.columns
    one = np.ones(rows(table), dtype=np.int64)
    mask = legal_mask(
        model_facts(model),
        dp=one,
        tp=one,
        cp=one,
        ep=one,
        expert_tp=one,
        micro_batch=one,
        pp=table["pp"],
        vpp=table["vpp"],
        schedule=table["schedule"],
        global_batch=table["microbatches"],
        sequence_parallel=one == 0,
    )
    return replace(found.only(mask), columns=keep({n: table[n] for n in ("schedule", "vpp")}, mask))


def _schedules(pp: int, layers: int, fixed: Constraints) -> list[tuple[int, int]]:
    """(schedule, vpp) pairs for a pipeline of `pp` stages. One stage runs no pipeline: 1F1B stands for all."""
    allowed = fixed.schedule or ((fixed.runs or tuple(Schedule)) if pp > 1 else (Schedule.ONE_F_ONE_B,))
    pairs: list[tuple[int, int]] = []
    for schedule in SCHEDULES:
        if schedule not in allowed:
            continue
        if schedule is Schedule.INTERLEAVED:
            sizes = fixed.values("vpp", virtual_sizes(layers, pp))
            sizes = [v for v in sizes if v > 1]
        else:
            size = 2 if schedule in (Schedule.ZBV, Schedule.DUALPIPEV) else 1
            sizes = [size] if fixed.vpp is None or size in fixed.vpp else []
        pairs += [(SCHEDULES.index(schedule), v) for v in sizes if pp * v <= layers]
    return pairs


def virtual_sizes(layers: int, pp: int) -> list[int]:
    """Virtual stages of interleaving: those that cut the layers of a stage evenly, rounded either way."""
    low, high = layers // pp, -(-layers // pp)
    return sorted({v for v in divisors(max(low, 1)) + divisors(high) if v > 1 and v * pp <= layers})


def _state_options(frames: Table, model: ModelSpec, cluster: Cluster, fixed: Constraints) -> Options:
    """ZeRO stage and shards times recompute, by replicas (dp * cp), tp and layers of a stage."""
    replicas = frames["dp"] * frames["cp"]
    depth = np.minimum(-(-model.num_layers // frames["pp"]), max(RECOMPUTE_STRIDES))
    keys = (replicas, frames["tp"], depth)
    example, code = distinct(keys)

    def options(index: int) -> Table:
        replicas, tp, depth = (int(key[example[index]]) for key in keys)
        zeros = _zero_choices(replicas, tp, cluster.domain, fixed)
        saves = _recompute_choices(depth, fixed)
        pairs = [(z, s, r, n) for r, n in saves for z, s in zeros]
        names = ("zero", "zero_shards", "recompute", "recompute_every")
        table = {name: column([pair[i] for pair in pairs]) for i, name in enumerate(names)}
        few, kept = _lean_zeros(zeros), _lean_saves(saves)
        return table | {"lean": column([int((z, s) in few and (r, n) in kept) for z, s, r, n in pairs])}

    return Options.by_key(code, options)


def _zero_choices(replicas: int, tp: int, domain: int, fixed: Constraints) -> list[tuple[int, int]]:
    """(stage, shards): everything sharded over all replicas, or HSDP within one or eight fast domains."""
    if replicas == 1:  # nothing to shard over: all stages are one
        return [(min(fixed.values("zero", [0])), 1)] if 1 in fixed.values("zero_shards", [1]) else []
    hybrid = {d * domain // tp for d in HSDP_DOMAINS}
    shards = sorted({replicas, *(h for h in hybrid if 1 < h < replicas and replicas % h == 0)}, reverse=True)
    if fixed.zero_shards is not None:
        shards = [s for s in fixed.zero_shards if replicas % s == 0]
    choices: list[tuple[int, int]] = []
    for stage in fixed.values("zero", [0, 1, 2, 3]):
        whole = [s for s in shards if s == replicas]  # nothing is sharded: only the trivial choice
        choices += [(stage, s) for s in (shards if stage else whole)]
    return choices


def _recompute_choices(depth: int, fixed: Constraints) -> list[tuple[int, int]]:
    strides = fixed.values("recompute_every", [n for n in RECOMPUTE_STRIDES if n <= depth])
    choices: list[tuple[int, int]] = []
    for mode in fixed.recompute or RECOMPUTES:
        choices += [(RECOMPUTES.index(mode), n) for n in (strides if mode is Recompute.FULL else [1])]
    return choices


def _lean_zeros(zeros: list[tuple[int, int]]) -> set[tuple[int, int]]:
    """Of (stage, shards) those that can hold least: the most shards of the highest stage, and of the highest below 3
    (ZeRO-3 gathers weights into buffers that the others do not need)."""
    stages = {stage for stage, _ in zeros}
    highest = {max(stages, default=0), max((s for s in stages if s < 3), default=3)}
    return {(stage, max(n for z, n in zeros if z == stage)) for stage in highest & stages}


def _lean_saves(saves: list[tuple[int, int]]) -> set[tuple[int, int]]:
    """Of (recompute, every) those that can hold least: the densest full recomputation (it also holds a whole layer
    while at work), and the most thorough of the others."""
    full = RECOMPUTES.index(Recompute.FULL)
    dense = min(((r, n) for r, n in saves if r == full), key=lambda save: save[1], default=None)
    others = [save for save in saves if save[0] != full]
    selective = max(others, key=lambda save: RECOMPUTES[save[0]] is Recompute.SELECTIVE, default=None)
    return {save for save in (dense, selective) if save is not None}


def _notes(seq: int, gpus: int, fixed: Constraints) -> tuple[str, ...]:
    if fixed.cp is not None or gpus == 1:
        return ()
    most = max(context_sizes(seq, gpus))
    tried = f"was tried up to {most}: beyond that" if most > 1 else "was not tried:"
    few = f"a rank would hold fewer than {MIN_TOKENS_PER_CP_RANK} tokens of a sequence"
    return (f"context parallel {tried} {few}; fix cp to try {'more' if most > 1 else 'it'}",)


__all__ = ["CHUNK_ROWS", "Space", "context_sizes", "space", "to_candidates", "virtual_sizes"]
