"""One chunk of a stage, forward and backward: its layers, the model's ends where it has them, and FSDP2 around them.

In: a model, a rank's work, the chunk's layers and how its state is sharded. Out: `ChunkMemory`, what an action adds at
its peak and what it leaves. Runs of equal layers are walked through once at either end; those between them are one
storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from math import ceil

from meshwright.cost.program.ends import embedding, loss
from meshwright.cost.program.layer import Model, Walk, layer, recomputed
from meshwright.cost.program.sharding import Sharding, Units, elements
from meshwright.cost.program.tape import Backward, Storage, Tape
from meshwright.cost.program.work import FP32, INDEX, Work
from meshwright.models.spec import Attention, ModelSpec, TensorSpec

WALKED = 3
"""Layers of a run that are walked through: the first and the last two."""


Step = tuple[int, tuple[int, bool], int]
"""Place of a layer in the chunk, its (kind, recomputed), and how many equal ones follow that are not walked through."""


@dataclass(frozen=True)
class Chunk:
    """`layers`: (kind, recomputed or not) in order. `first` and `last` of the model."""

    layers: tuple[tuple[int, bool], ...]
    first: bool
    last: bool


@dataclass(frozen=True)
class ChunkMemory:
    """Bytes of one microbatch in a chunk beside what is held already: peaks of forward, backward and (where it is
    split) weight actions; what is `kept` from forward to backward, `left` from a split backward to its weights, the
    gradient of the chunk's input, and what is `retained` until the chunk's next backward pass."""

    forward_peak: float
    kept: float
    backward_peak: float
    left: float
    weights_peak: float
    input_gradient: float
    retained: float


@lru_cache(maxsize=4096)
def chunk_memory(
    model: Model, chunk: Chunk, work: Work, sharding: Sharding, selective: bool, split: bool
) -> ChunkMemory:
    """Walk a microbatch through the chunk."""
    spec = model.spec
    plain = sharding.zero == 0 or sharding.shards == 1
    tape = Tape(split=split, gathered=_collects(work, sharding), at_once=plain)
    plan = _plan(chunk.layers)
    walked = [(at, key[0]) for at, key, count in plan if count == 1]
    units = Units(tape, spec, walked, chunk.first, chunk.last, work, sharding)
    kept_tables, passing_tables = _tables(tape, spec, chunk, work)
    source = Storage(work.stream)  # tokens, or a receive buffer, which the pipeline counts
    output, backwards = _forward(tape, model, chunk, plan, work, units, source, selective)
    units.forward_done()
    tape.drop(*passing_tables)
    forward_peak, kept = tape.peak, tape.live
    tape.peak = tape.live
    gradient = Storage(0.0) if chunk.last else Storage(work.stream)  # one number, or a receive buffer
    tape.hold(gradient)
    units.backward_begins()
    for backward in reversed(backwards):
        gradient = backward(gradient)
    tape.drop(output, *kept_tables)
    retained = units.backward_done()
    input_gradient = 0.0 if chunk.first else work.stream
    left = tape.live - input_gradient
    weights_peak = tape.left_weight_bytes
    if split and units.active:
        weights_peak = _sharded_weights_peak(spec, chunk, work, units, left)
        weights_peak += tape.left_weight_bytes if work.narrow else 0.0  # cast to the format of the sums one by one
    return ChunkMemory(forward_peak, kept, tape.peak - kept, left, weights_peak, input_gradient, retained)


def _sharded_weights_peak(spec: ModelSpec, chunk: Chunk, work: Work, units: Units, left: float) -> float:
    """Weights' gradients of a split pass stay whole, in the format of the sums, until all are made (under ZeRO-1 they
    are state after the first pass); then what they were made of goes, and the units reduce them. Beside `left`, which
    others count."""

    def count(tensors: tuple[TensorSpec, ...]) -> float:
        return sum(elements(tensors, work.tp, work.ep, work.expert_tp))

    whole = FP32 * sum(count(spec.kinds[kind].tensors) for kind, _ in chunk.layers)
    if chunk.last:
        whole += FP32 * count(spec.output_tensors)
    if units.sharding.zero == 1 and not units.sharding.turn.begins:
        whole = 0.0
    if units.sharding.zero == 1 and not units.sharding.turn.ends:
        return whole
    reduction = max(FP32 * unit.elements * (1 + 1 / unit.shards) for unit in units.units.values())
    # the embedding's gradient came with the inputs and waits with the others
    products = left - (FP32 * count(spec.embedding_tensors) if chunk.first else 0.0)
    return max(whole, whole + reduction - products)


def _collects(work: Work, sharding: Sharding) -> bool:
    """Whether weights' gradients stay until their unit is done. Where fp32 ones accumulate whole, all but the first are
    added in place."""
    if sharding.zero == 0 or max(sharding.shards, sharding.expert_shards) == 1:
        return False
    return work.narrow or sharding.zero >= 2 or sharding.turn.begins


def _tables(tape: Tape, spec: ModelSpec, chunk: Chunk, work: Work) -> tuple[list[Storage], list[Storage]]:
    """What the layers share: tables of rotary embeddings, which autograd keeps (per kind of attention), positions, and
    masks of sliding windows, which only the forward pass holds."""
    kept: list[Storage] = []
    passing = [tape.new(INDEX * work.seq / work.cp)]
    kinds = {kind for kind, _ in chunk.layers}
    mixers = {m.window: m for m in (spec.kinds[k].mixer for k in kinds) if isinstance(m, Attention)}
    rotary = spec.model_type not in ("gpt2",)
    for window, mixer in mixers.items():
        if rotary:
            width = getattr(mixer, "rotary_dim", None) or mixer.qk_dim
            kept += [tape.new(work.element * work.seq / work.cp * width) for _ in range(2)]
        if window is not None and window < work.seq and work.cp == 1:
            passing.append(tape.new(1.0 * work.seq**2))
    return kept, passing


def _forward(
    tape: Tape,
    model: Model,
    chunk: Chunk,
    plan: list[Step],
    work: Work,
    units: Units,
    source: Storage,
    selective: bool,
) -> tuple[Storage, list[Backward]]:
    """Through the chunk. The caller's name holds a layer's input until the layer returns."""
    spec, backwards = model.spec, list[Backward]()
    vocab = ceil(spec.vocab / work.tp)
    hidden = source
    if chunk.first:
        positions = spec.embedding_tensors[1].shape[0] if spec.model_type == "gpt2" else 0
        hidden, backward = embedding(tape, work, vocab, positions=positions, scaled=model.sandwiched)
        backwards.append(backward)
    else:
        tape.hold(hidden)
    kinds: dict[tuple[int, bool], Grown] = {}
    for at, key, count in plan:
        if count > 1:
            backwards.append(_skipped(tape, tape.new(count * kinds[key].kept), kinds[key], count))
            continue
        before = tape.live - units.flat_bytes
        grown = kinds.setdefault(key, Grown())
        following, backward = _walked(tape, units, at, _walk(model, key, work, selective), hidden, grown)
        tape.drop(hidden)
        hidden = following
        backwards.append(backward)
        grown.kept = tape.live - units.flat_bytes - before
    if chunk.last:
        tied = spec.tied_embeddings and chunk.first
        following, backward = loss(tape, work, hidden, vocab, model.norm, tied=tied)
        tape.drop(hidden)
        hidden = following
        backwards.append(backward)
    return hidden, backwards


def _plan(layers: tuple[tuple[int, bool], ...]) -> list[Step]:
    """How a run of equal layers is walked through: one by one, but for those between the first and the last two."""
    plan: list[Step] = []
    at = 0
    for key, run in groupby(layers):
        count = len(list(run))
        for length in [1] * count if count <= WALKED + 1 else [1, count - WALKED, 1, 1]:
            plan.append((at, key, length))
            at += length
    return plan


@dataclass
class Grown:
    """What one layer of a kind keeps from forward to backward, and leaves from a split backward to its weights."""

    kept: float = 0.0
    left: float = 0.0


def _walked(tape: Tape, units: Units, at: int, walk: Walk, hidden: Storage, grown: Grown) -> tuple[Storage, Backward]:
    """One layer between the hooks of its FSDP unit."""
    name = ("layer", at)
    tape.experts = units.hooks(("expert", at))
    units.gather(name)
    out, inside = walk(tape, hidden)
    units.release(name)

    def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
        before = tape.live
        tape.experts = units.hooks(("expert", at))
        units.needed(name)
        of_input = inside(gradient, accumulated)
        units.reduce(name)
        grown.left = tape.live - before + grown.kept
        return of_input

    return out, backward


def _walk(model: Model, key: tuple[int, bool], work: Work, selective: bool) -> Walk:
    walk = layer(model, model.spec.kinds[key[0]], work, selective)
    return recomputed(walk) if key[1] else walk


def _skipped(tape: Tape, bulk: Storage, grown: Grown, count: int) -> Backward:
    """Layers that are not walked through: what they keep goes at once; what a split backward leaves of them stays."""

    def backward(gradient: Storage, accumulated: Storage | None = None) -> Storage:
        tape.drop(bulk)
        if tape.split:
            tape.new(count * grown.left)
        return tape.add(gradient, accumulated)

    return backward


def layers_of(pattern: Sequence[int], indices: range, recompute_every: int | None) -> tuple[tuple[int, bool], ...]:
    """The layers of a chunk by their global indices; those that every n-th is recomputed of."""
    return tuple((pattern[i], recompute_every is not None and i % recompute_every == 0) for i in indices)
