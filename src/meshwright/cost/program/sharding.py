"""FSDP2 on the tape: weights gathered unit by unit, gradients reduced, and the buffers of both (`runtime.sharded`).

A unit is a decoder layer, its routed experts, or the ends of the model that a chunk holds (the root, gathered first and
reduced last). Weights that stay gathered (ZeRO-1 and 2) and gradients that accumulate are state, which others count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache

from meshwright.cost.program.tape import Storage, Tape
from meshwright.cost.program.work import FP32, Work
from meshwright.models.counting import per_rank_elements
from meshwright.models.spec import ModelSpec, TensorSpec

Name = tuple[str, int]
ROOT: Name = ("root", -1)


class Turn(StrEnum):
    """Which pass of a chunk in a step: weights are gathered and gradients made in the first, complete in the last."""

    FIRST = "first"
    MIDDLE = "middle"
    LAST = "last"
    ONLY = "only"

    @property
    def begins(self) -> bool:
        return self in (Turn.FIRST, Turn.ONLY)

    @property
    def ends(self) -> bool:
        return self in (Turn.LAST, Turn.ONLY)


@dataclass(frozen=True)
class Sharding:
    """`shards` 1: nothing is sharded. `expert_shards`: of routed experts."""

    zero: int = 0
    shards: int = 1
    expert_shards: int = 1
    turn: Turn = Turn.MIDDLE

    def at(self, turn: Turn) -> Sharding:
        return replace(self, turn=turn)


@dataclass
class Unit:
    """Elements of a unit on a rank before sharding, over how many ranks it is sharded, and the bytes of its last
    weight's gradient."""

    elements: float
    shards: int
    last: float = 0.0
    weights: Storage | None = None
    flat: Storage | None = None  # the all-gather's output, until it is copied out
    gradients: list[Storage] | None = None


@dataclass(frozen=True)
class Hooks:
    """The hooks of one unit."""

    units: Units
    name: Name

    def gather(self) -> None:
        self.units.gather(self.name)

    def release(self) -> None:
        self.units.release(self.name)

    def needed(self) -> None:
        self.units.needed(self.name)

    def reduce(self) -> None:
        self.units.reduce(self.name)


class Units:
    """The units of one chunk. Called at the places where FSDP2's hooks run. `walked`: (place, kind) of its layers."""

    def __init__(
        self,
        tape: Tape,
        spec: ModelSpec,
        walked: Sequence[tuple[int, int]],
        first: bool,
        last: bool,
        work: Work,
        sharding: Sharding,
    ) -> None:
        self.tape, self.work, self.sharding = tape, work, sharding
        self.active = sharding.zero > 0 and max(sharding.shards, sharding.expert_shards) > 1
        self.regathers = self.active and sharding.zero == 3
        reducing = sharding.zero >= 2 or sharding.turn.ends
        self.reduces = self.active and reducing and not tape.split  # else after the weights' own action
        self.units: dict[Name, Unit] = {}
        self.order: list[Name] = []  # as their forward passes end
        self.shared_flat: Storage | None = None  # the last all-gather of the forward pass
        self.reducing: Storage | None = None  # input of the last reduce-scatter
        self.backward = False
        if not self.active:
            return
        for at, kind in walked:
            tensors = spec.kinds[kind].tensors
            dense, expert = elements(tensors, work.tp, work.ep, work.expert_tp)
            if expert:
                self._add(("expert", at), expert, sharding.expert_shards, _last(tensors, work, of_experts=True))
            self._add(("layer", at), dense, sharding.shards)
        ends = (spec.embedding_tensors if first else ()) + (spec.final_tensors if last else ())
        ends += spec.head_tensors if last and (first or not spec.tied_embeddings) else ()
        ends += spec.tied_tensors if last and not first else ()
        root = elements(ends, work.tp, work.ep, work.expert_tp)[0] if ends else 0.0
        self._add(ROOT, root, sharding.shards, _last(ends, work))
        self._collect(ROOT)
        self.gather(ROOT)

    def _add(self, name: Name, count: float, shards: int, last: float = 0.0) -> None:
        self.units[name] = Unit(count, shards, last)
        self.order.append(name)

    def gather(self, name: Name) -> None:
        """Before a unit's forward pass, or its recomputation."""
        if not self.active or not self.units[name].elements:
            return
        if not (self.regathers or self.sharding.turn.begins):
            return
        if self.backward:
            self.needed(name)
            return
        self._all_gather(name)
        unit = self.units[name]
        unit.weights = self.tape.new(self.work.element * unit.elements)
        self.tape.drop(self.shared_flat)
        self.shared_flat, unit.flat = unit.flat, None
        if not self.regathers:  # state from now on
            self.tape.drop(unit.weights)
            unit.weights = None

    def release(self, name: Name) -> None:
        """After a unit's forward pass: recomputed ones stay for backward."""
        if not self.backward:
            self._reshard(name)

    def _reshard(self, name: Name) -> None:
        if self.regathers:
            self.tape.drop(self.units[name].weights)
            self.units[name].weights = None

    def hooks(self, name: Name) -> Hooks | None:
        """Those of a unit inside a layer, if it is one."""
        return Hooks(self, name) if name in self.units else None

    def forward_done(self) -> None:
        """The chunk's forward pass is over."""
        if self.regathers:
            self.release(ROOT)
        self.tape.drop(self.shared_flat)
        self.shared_flat = None

    @property
    def flat_bytes(self) -> float:
        """Of the all-gather that the next one will free."""
        return self.shared_flat.nbytes if self.shared_flat else 0.0

    def backward_begins(self) -> None:
        self.backward = True
        if self.active:
            self.needed(ROOT)

    def backward_done(self) -> float:
        """Returns the bytes that stay until the next backward pass: the last reduction's input."""
        if not self.active:
            return 0.0
        self.reduce(ROOT)
        kept = self.reducing.nbytes if self.reducing else 0.0
        self.tape.drop(self.reducing)
        if self.tape.split and self.sharding.zero >= 2:  # after the weights' action, the last layer's
            kept = FP32 * self.units[self.order[-2]].elements if len(self.order) > 1 else 0.0
        return 0.0 if self.sharding.turn.ends else kept

    def needed(self, name: Name) -> None:
        """Before a unit's backward pass: its weights, and the next unit's under way."""
        if not self.active:
            return
        self._collect(name)
        unit = self.units[name]
        if not self.regathers or unit.weights is not None:
            return
        if not unit.elements:
            self._prefetch_before(name)
            return
        if unit.flat is None:
            self._all_gather(name)
        unit.weights = self.tape.new(self.work.element * unit.elements)
        self.tape.drop(unit.flat)
        unit.flat = None
        self._prefetch_before(name)

    def reduce(self, name: Name) -> None:
        """After a unit's backward pass."""
        if not self.active:
            return
        unit, tape = self.units[name], self.tape
        self._reshard(name)
        found = unit.gradients or []
        unit.gradients = None
        self._collect(("layer", name[1]) if name[0] == "expert" else ROOT)
        if not unit.elements:
            return
        if not self.reduces:
            accumulated: list[Storage] = []
            waits = self.sharding.zero >= 2  # of a split pass: reduced with the weights' own action
            for gradient in found:
                if waits or (self.sharding.turn is Turn.FIRST and self.work.narrow):
                    accumulated.append(tape.new(gradient.nbytes * FP32 / self.work.element))
                tape.drop(gradient)
            if not waits:
                tape.drop(*accumulated)  # state from now on
            return
        tape.drop(self.reducing)
        self.reducing = tape.new(FP32 * unit.elements)
        tape.drop(*found)
        # FSDP2's last name for a gradient outlives the list
        tape.passing(unit.last, FP32 * unit.elements / unit.shards)

    def _collect(self, name: Name) -> None:
        """Weights' gradients that are made now belong to this unit."""
        unit = self.units[name]
        if unit.gradients is None:
            unit.gradients = []
        self.tape.unit_gradients = unit.gradients

    def _prefetch_before(self, name: Name) -> None:
        at = self.order.index(name)
        if at > 0:
            self._prefetch(self.order[at - 1])

    def _prefetch(self, name: Name) -> None:
        unit = self.units[name]
        if unit.elements and unit.flat is None and unit.weights is None:
            self._all_gather(name)

    def _all_gather(self, name: Name) -> None:
        """The rank's shard side by side, and everybody's."""
        unit, tape = self.units[name], self.tape
        shard = tape.new(self.work.element * unit.elements / unit.shards)
        unit.flat = tape.new(self.work.element * unit.elements)
        tape.drop(shard)


@lru_cache(maxsize=4096)
def elements(tensors: tuple[TensorSpec, ...], tp: int, ep: int, expert_tp: int) -> tuple[float, float]:
    """Dense and expert elements of tensors on a rank."""
    dense, expert = per_rank_elements(tensors, tp, ep, expert_tp)
    return float(dense), float(expert)


def _last(tensors: tuple[TensorSpec, ...], work: Work, *, of_experts: bool = False) -> float:
    """Bytes of the gradient of the last tensor (of a layer it is a norm's, and small)."""
    own = [t for t in tensors if bool(t.experts) == of_experts]
    return work.element * sum(elements((own[-1],), work.tp, work.ep, work.expert_tp)) if own else 0.0
