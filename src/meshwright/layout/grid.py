"""Ranks as a grid: rank <-> coordinates both ways, and the groups of every axis and combination, as arrays.

In: a `HybridParallelConfig` and the name of an order ('default', 'vllm', or a Megatron-core order string such as
'tp-cp-ep-dp-pp'). Out: a `RankLayout`. Everything is NumPy: 100,000 ranks take milliseconds.

Group names: dp, pp, cp, tp; combinations of them joined by '-' or '_' (dp_cp, tp_cp, tp_dp); model (tp x pp: one copy
of the weights); ep, expert_tp, expert_dp, ep_expert_tp; embedding (first and last stage); zero_shard and zero_replica
(the two levels of HSDP).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meshwright.errors import InputError, suggestion
from meshwright.layout.config import AXES, HybridParallelConfig

RankArray = NDArray[np.int64]

MEGATRON = "tp-cp-ep-dp-pp"
"""Megatron-core's own default order, innermost first."""

EXPERT_AXES = ("pp", "expert_dp", "ep", "expert_tp")


@dataclass(frozen=True)
class Grid:
    """Ranks placed on named axes, outermost first. `ranks` has one dimension per axis and holds every rank once."""

    axes: tuple[str, ...]
    ranks: RankArray

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(self.axes, self.ranks.shape, strict=True))

    @cached_property
    def _positions(self) -> RankArray:
        """Flat grid position of each rank."""
        positions = np.empty(self.ranks.size, dtype=np.int64)
        positions[self.ranks.ravel()] = np.arange(self.ranks.size)
        return positions

    def coordinates(self, ranks: ArrayLike) -> dict[str, RankArray]:
        """Coordinate on every axis of each rank."""
        flat = _within(ranks, self.ranks.size, "rank")
        found = np.unravel_index(self._positions[flat], self.ranks.shape)
        return {axis: np.asarray(c, dtype=np.int64) for axis, c in zip(self.axes, found, strict=True)}

    def rank(self, coordinates: Mapping[str, ArrayLike]) -> RankArray:
        """Rank at the coordinates (0 on axes left out); arrays broadcast."""
        for name in coordinates:
            if name not in self.axes:
                raise InputError(f"no axis {name!r}{suggestion(name, self.axes)}; axes are {', '.join(self.axes)}")
        index = tuple(_within(coordinates.get(a, 0), n, f"{a} coordinate") for a, n in self.sizes.items())
        return self.ranks[index]

    def groups(self, *axes: str) -> RankArray:
        """[groups, size]: ranks that share all coordinates but those of `axes`; members and groups in grid order."""
        inside = [a for a in self.axes if a in axes]
        outside = [a for a in self.axes if a not in axes]
        order = [self.axes.index(a) for a in outside + inside]
        size = prod(self.sizes[a] for a in inside)
        return self.ranks.transpose(order).reshape(-1, size)


def _within(values: ArrayLike, size: int, what: str) -> RankArray:
    found = np.asarray(values)
    if found.dtype.kind not in "iu":
        raise InputError(f"{what} must be a whole number, got {values!r}")
    if found.size and (int(found.min()) < 0 or int(found.max()) >= size):
        raise InputError(f"{what} must be between 0 and {size - 1}")
    return found.astype(np.int64)


@dataclass(frozen=True)
class RankLayout:
    """Where every rank of a job sits, in one order. `dense` has the axes of the mesh; `expert` regroups each stage
    as expert_dp x ep x expert_tp for expert layers (`expert_grid` is text where the order has no such grid)."""

    config: HybridParallelConfig
    order: str
    dense: Grid
    expert_grid: Grid | str

    @property
    def expert(self) -> Grid:
        if isinstance(self.expert_grid, str):
            raise InputError(self.expert_grid)
        return self.expert_grid

    @property
    def world_size(self) -> int:
        return self.config.world_size

    def coordinates(self, ranks: ArrayLike) -> dict[str, RankArray]:
        """Coordinates on the dense axes of each rank."""
        return self.dense.coordinates(ranks)

    def expert_coordinates(self, ranks: ArrayLike) -> dict[str, RankArray]:
        """Coordinates on pp, expert_dp, ep and expert_tp of each rank."""
        return self.expert.coordinates(ranks)

    def rank(self, **coordinates: ArrayLike) -> RankArray:
        """Rank at dense coordinates (0 on axes left out)."""
        return self.dense.rank(coordinates)

    def groups(self, name: str) -> RankArray:
        """[groups, size] of an axis or combination (names in the module's docstring)."""
        name = name.replace("-", "_").lower()
        if name == "embedding":
            stages = self.dense.groups("pp")
            return stages[:, [0, -1]] if self.config.pp > 1 else stages
        if name in ("zero_shard", "zero_replica"):
            return self._sharded_groups(name)
        if name == "model":
            return self.dense.groups("pp", "tp")
        axes = _axes_of(name)
        known = (*self.dense.axes, *EXPERT_AXES[1:], "dp_cp", "model", "embedding", "zero_shard", "zero_replica")
        if any(axis not in known for axis in axes):
            raise InputError(f"no group {name!r}{suggestion(name, known)}; groups are {', '.join(known)}")
        grid = self.expert if any(a in EXPERT_AXES[1:] for a in axes) else self.dense
        if any(axis not in grid.axes for axis in axes):
            raise InputError(f"no group {name!r}: dense and expert axes do not combine except through pp")
        return grid.groups(*axes)

    def _sharded_groups(self, name: str) -> RankArray:
        """dp x cp groups cut into runs of `zero_shards` neighbours, and the ranks at the same place of each run."""
        replicas = self.groups("dp_cp")
        shards = self.config.zero_shards or replicas.shape[1]
        runs = replicas.reshape(len(replicas), -1, shards)
        return runs.reshape(-1, shards) if name == "zero_shard" else runs.transpose(0, 2, 1).reshape(-1, runs.shape[1])

    def group_of(self, rank: int, name: str) -> RankArray:
        """The ranks of the group that `rank` is in (empty: it is in none, as a middle stage for 'embedding')."""
        _within(rank, self.world_size, "rank")
        groups = self.groups(name)
        row = np.nonzero((groups == rank).any(axis=1))[0]
        return groups[row[0]] if len(row) else np.empty(0, dtype=np.int64)


def _axes_of(name: str) -> tuple[str, ...]:
    """'dp_cp' -> (dp, cp); 'ep_expert_tp' -> (ep, expert_tp)."""
    words = name.replace("expert_", "expert+").replace("external_", "external+").split("_")
    return tuple(word.replace("+", "_") for word in words)


def rank_layout(config: HybridParallelConfig, order: str = "default") -> RankLayout:
    """The layout of a config in a named order: 'default' (dp outermost, then pp, cp, tp), 'megatron' (its default
    order string), any Megatron order string, or 'vllm'."""
    name = order.strip().lower()
    if name == "default":
        return _stage_overlay(config, name, AXES)
    if name == "vllm":
        return _vllm(config)
    if name == "megatron":
        return _megatron(config, MEGATRON)
    if "-" in name or name in ("tp", "cp", "ep", "dp", "pp"):
        return _megatron(config, name)
    hint = suggestion(name, ("default", "megatron", "vllm"))
    raise InputError(
        f"unknown rank order {order[:60]!r}{hint}; choose default, megatron, vllm or an order string like {MEGATRON}"
    )


def _stage_overlay(config: HybridParallelConfig, order: str, axes: tuple[str, ...]) -> RankLayout:
    """Dense axes as one reshape of the ranks; experts regroup the ranks of a stage in the same sequence."""
    shape = tuple(int(getattr(config, a)) for a in axes)
    dense = Grid(axes, np.arange(config.world_size, dtype=np.int64).reshape(shape))
    by_stage = dense.groups(*(a for a in axes if a != "pp"))
    expert = by_stage.reshape(config.pp, config.expert_dp, config.ep, config.expert_tp)
    return RankLayout(config, order, dense, Grid(EXPERT_AXES, expert))


def _vllm(config: HybridParallelConfig) -> RankLayout:
    """vLLM: ExternalDP x DP x PP x PCP x TP; experts spread over DP x PCP x TP of one stage, expert by expert.

    `external_dp` are replicas that share nothing. With expert parallelism they are the expert_dp of the config; without
    it all of dp is taken as one engine's.
    """
    if config.expert_tp > 1:
        raise InputError(f"vLLM does not split single experts: use expert_tp=1, not {config.expert_tp}")
    external = config.expert_dp if config.ep > 1 else 1
    if config.dp % external:
        raise InputError(
            f"vLLM spreads experts over DP x PCP x TP of an engine: ep={config.ep} must be cp x tp = "
            f"{config.cp * config.tp} times a divisor of dp={config.dp}"
        )
    axes = ("external_dp", "dp", "pp", "cp", "tp")
    shape = (external, config.dp // external, config.pp, config.cp, config.tp)
    dense = Grid(axes, np.arange(config.world_size, dtype=np.int64).reshape(shape))
    engines = dense.groups("dp", "cp", "tp").reshape(external, config.pp, -1)  # [external, pp, ranks of a stage]
    by_stage = engines.transpose(1, 0, 2).reshape(config.pp, config.expert_dp, config.ep, 1)
    return RankLayout(config, "vllm", dense, Grid(EXPERT_AXES, by_stage))


def _megatron(config: HybridParallelConfig, order: str) -> RankLayout:
    """Megatron-core: an order string lists axes innermost first; dense and expert layers each get a grid of their own
    from it (dense without ep; expert with tp = expert_tp, without cp), which must agree on the pipeline groups."""
    tokens = order.split("-")
    order = order[:60]
    dense_sizes = {"tp": config.tp, "cp": config.cp, "ep": 1, "dp": config.dp, "pp": config.pp}
    expert_sizes = {"tp": config.expert_tp, "cp": 1, "ep": config.ep, "dp": config.expert_dp, "pp": config.pp}
    for token in tokens:
        if token not in dense_sizes:
            raise InputError(f"order {order!r}: no axis {token!r}; Megatron's axes are tp, cp, ep, dp, pp")
        if tokens.count(token) > 1:
            raise InputError(f"order {order!r} names {token} twice")
    for axis in dense_sizes:
        size = dense_sizes[axis] if dense_sizes[axis] > 1 else expert_sizes[axis]  # as it was typed, where it was
        if axis not in tokens:
            if size > 1:
                raise InputError(f"order {order!r} does not place {axis}, whose size is {size}")
            tokens.append(axis)
    dense = _from_order(config.world_size, tokens, dense_sizes)
    expert = _from_order(config.world_size, tokens, expert_sizes)
    dense_named = _without(dense, "ep")
    if not np.array_equal(dense.groups("pp"), expert.groups("pp")):
        problem = (
            f"order {order!r} gives dense and expert layers different pipelines; put pp last, or make "
            f"expert_dp={config.expert_dp} equal dp={config.dp}"
        )
        if config.ep * config.expert_tp > 1:
            raise InputError(problem)
        return RankLayout(config, order, dense_named, problem)  # no experts are split: only their groups are missing
    names = {"dp": "expert_dp", "tp": "expert_tp"}
    expert_named = Grid(tuple(names.get(a, a) for a in expert.axes), expert.ranks)
    return RankLayout(config, order, dense_named, _without(expert_named, "cp"))


def _from_order(world: int, tokens: list[str], sizes: dict[str, int]) -> Grid:
    axes = tuple(reversed(tokens))
    return Grid(axes, np.arange(world, dtype=np.int64).reshape(tuple(sizes[a] for a in axes)))


def _without(grid: Grid, axis: str) -> Grid:
    """The grid without an axis of size 1."""
    return Grid(tuple(a for a in grid.axes if a != axis), grid.ranks.squeeze(grid.axes.index(axis)))
