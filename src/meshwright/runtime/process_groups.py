"""Process groups of every axis and the usual combinations, on one DeviceMesh, created in one order on all ranks.

In: a HybridParallelConfig in a world that torch.distributed has joined. Out: a `ProcessGroupManager` that is passed to
whoever communicates; nothing about the mesh lives in a module. Each axis is an `AxisGroup` that also carries the
recorder of the ledger. Groups with equal members are one group: a laptop's world has few.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh

from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig
from meshwright.layout.grid import RankLayout, rank_layout
from meshwright.ledger import Collective
from meshwright.runtime.launch import Device
from meshwright.runtime.recorder import LoggedWait, Recorder, Stopwatch
from meshwright.runtime.step_trace import OpenCall, TracedWait

RankGroups = NDArray[np.int64]  # [groups, size]

MESH_DIMS = ("zero_replica", "zero_shard", "pp", "tp")
"""Axes of the DeviceMesh. dp x cp, whose ranks share gradients, is two of them: HSDP shards within zero_shard and
replicates across zero_replica. (cp and the expert axes have groups, but nothing is placed along them.)"""

LAYOUT_GROUPS = (
    *("tp", "cp", "pp", "dp", "dp_cp", "tp_cp", "model", "zero_shard", "zero_replica"),
    *("expert_tp", "ep", "expert_dp", "embedding"),
)
"""Axes and combinations that get a group, as `layout.grid` names them."""

NO_TIMEOUT = timedelta(0)
"""torch's own default: wait as long as the group's timeout says."""

BOOKED_ON: dict[str, str] = dict.fromkeys(("dp_cp", "zero_shard", "zero_replica"), "dp")
"""Ledger axis of groups that are part of an axis or stand for it; other groups are booked under their own name."""


@dataclass(frozen=True)
class AxisGroup:
    """The ranks that share all coordinates with this one but those of `axis`. `ranks` are global, in axis order;
    `axis` is the ledger's name."""

    axis: str
    group: dist.ProcessGroup
    rank: int
    ranks: tuple[int, ...]
    recorder: Recorder = field(repr=False)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    @property
    def next_rank(self) -> int:
        """Global rank of the next one on a ring."""
        return self.ranks[(self.rank + 1) % self.size]

    @property
    def previous_rank(self) -> int:
        return self.ranks[(self.rank - 1) % self.size]

    def record(
        self,
        collective: Collective,
        what: str,
        call_bytes: int,
        dtype: torch.dtype | None = None,
        peer: int = -1,
        asynchronous: bool = False,
    ) -> OpenCall | None:
        """Book a call that is about to be made. `peer`: global rank at the other end of a message. `asynchronous`: what
        is returned (None: no timeline is made) belongs to the `waiting` that ends it."""
        recorder = self.recorder
        recorder.record(self.axis, collective, what, self.size, call_bytes)
        if recorder.flight is not None:
            name = "" if dtype is None else str(dtype).removeprefix("torch.")
            recorder.flight.issued(self.axis, self.ranks, collective, recorder.phase, what, call_bytes, name, peer)
        trace = recorder.trace
        if trace is None:
            return None
        return trace.issued(
            self.axis, self.ranks, collective, recorder.phase, what, call_bytes, peer, asynchronous=asynchronous
        )

    def waiting(self, peer: int = -1, *calls: OpenCall | None) -> Stopwatch | LoggedWait | TracedWait:
        """A context for what blocks on this axis: its wall time is booked on the axis. `peer`: it waits for a message
        from that rank; `calls`: for these, which were recorded as asynchronous."""
        recorder = self.recorder
        watch = recorder.waiting(self.axis)
        wait = watch if recorder.flight is None else LoggedWait(watch, recorder.flight, self.axis, self.ranks, peer)
        if recorder.trace is None:
            return wait
        return TracedWait(wait, recorder.trace, self.ranks, tuple(call for call in calls if call is not None))

    def under_way(self, work: dist.Work, call: OpenCall | None) -> dist.Work:
        """An asynchronous call as something to wait for that books the wait on this axis."""
        return WorkOnAxis(work, self, call)


class WorkOnAxis(dist.Work):
    """A collective under way; waiting for it is booked on its axis."""

    def __init__(self, work: dist.Work, axis: AxisGroup, call: OpenCall | None) -> None:
        super().__init__()
        self._work, self._axis, self._call = work, axis, call
        trace = axis.recorder.trace
        if call is not None and trace is not None and trace.tells_ends:
            call.follow(work)

    def wait(self, timeout: timedelta = NO_TIMEOUT) -> bool:
        with self._axis.waiting(-1, self._call):
            return self._work.wait(timeout)


class ProcessGroupManager:
    """All groups of this rank. Build it on every rank of the world with the same config and rank order."""

    def __init__(
        self,
        config: HybridParallelConfig,
        device: Device,
        recorder: Recorder | None = None,
        order: str = "default",
    ) -> None:
        if config.world_size != dist.get_world_size():
            raise InputError(
                f"the plan needs dp {config.dp} x pp {config.pp} x cp {config.cp} x tp {config.tp} = "
                f"{config.world_size} ranks, but {dist.get_world_size()} were started"
            )
        self.config = config
        self.device = device
        self.layout = rank_layout(config, order)
        self.recorder = recorder or Recorder()
        self.rank = dist.get_rank()
        self._by_members: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._axes = {
            axis: self._create(axis, groups)
            for axis, groups in _rank_groups(self.layout).items()
            if self.rank in groups  # a middle stage has no embedding group
        }
        self.mesh = self._device_mesh()

    def axis(self, name: str) -> AxisGroup:
        """The group of an axis or combination: dp, pp, cp, tp, ep, expert_dp, expert_tp, dp_cp, tp_cp, model;
        zero_shard and zero_replica (dp x cp ranks that share one copy of sharded state, and the copies); embedding
        (first and last stage only); of a model with experts also expert_shard and expert_replica, the like of
        zero_shard and zero_replica."""
        return self._axes[name]

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(self._axes)

    def get_tensor_parallel_group(self) -> dist.ProcessGroup:
        return self.axis("tp").group

    def get_tensor_parallel_rank(self) -> int:
        return self.axis("tp").rank

    def get_tensor_parallel_world_size(self) -> int:
        return self.axis("tp").size

    def get_pipeline_parallel_group(self) -> dist.ProcessGroup:
        return self.axis("pp").group

    def get_pipeline_parallel_rank(self) -> int:
        return self.axis("pp").rank

    def get_pipeline_parallel_world_size(self) -> int:
        return self.axis("pp").size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.axis("dp").group

    def get_data_parallel_rank(self) -> int:
        return self.axis("dp").rank

    def get_data_parallel_world_size(self) -> int:
        return self.axis("dp").size

    def get_context_parallel_group(self) -> dist.ProcessGroup:
        return self.axis("cp").group

    def get_expert_parallel_group(self) -> dist.ProcessGroup:
        return self.axis("ep").group

    def split_axis(self, name: str, axis: str, size: int) -> AxisGroup:
        """Runs of `size` neighbours on an axis as groups of their own (tp ranks that hold the same KV head). All
        ranks of the axis must call this in the same order; the new axis is known as `name` in groups, and its
        traffic is booked on `axis`."""
        if name not in self._axes:
            parent = self.axis(axis)
            if parent.size % size:
                raise InputError(f"{axis}={parent.size} ranks do not divide into runs of {size}")
            mine = parent.rank // size * size
            members = parent.ranks[mine : mine + size]
            self._axes[name] = AxisGroup(axis, self._group(name, members), parent.rank - mine, members, self.recorder)
        return self._axes[name]

    def across_axis(self, name: str, axis: str, size: int) -> AxisGroup:
        """The ranks at the same place of each run that `split_axis` makes. The same rules hold."""
        if name not in self._axes:
            parent = self.axis(axis)
            members = parent.ranks[parent.rank % size :: size]
            place = parent.rank // size
            self._axes[name] = AxisGroup(axis, self._group(name, members), place, members, self.recorder)
        return self._axes[name]

    def close(self) -> None:
        """Destroy the groups made here. The world stays."""
        for members, group in reversed(self._by_members.items()):
            if len(members) != dist.get_world_size():
                dist.destroy_process_group(group)
        self._by_members.clear()
        self._axes.clear()

    def _create(self, axis: str, groups: RankGroups) -> AxisGroup:
        row, column = (int(i) for i in np.argwhere(groups == self.rank)[0])
        members = tuple(int(r) for r in groups[row])
        return AxisGroup(BOOKED_ON.get(axis, axis), self._group(axis, members), column, members, self.recorder)

    def _group(self, axis: str, members: tuple[int, ...]) -> dist.ProcessGroup:
        if len(members) == dist.get_world_size() and dist.group.WORLD is not None:
            self._by_members.setdefault(members, dist.group.WORLD)
        if members not in self._by_members:
            # only members take part: cost does not grow with the number of groups in the world
            group = dist.new_group(list(members), use_local_synchronization=True, group_desc=f"{axis}:{members[0]}")
            assert isinstance(group, dist.ProcessGroup)
            self._by_members[members] = group
        return self._by_members[members]

    def _device_mesh(self) -> DeviceMesh:
        grid = torch.from_numpy(np.ascontiguousarray(_mesh_grid(self.layout)))
        groups = [self.axis(dim).group for dim in MESH_DIMS]
        return DeviceMesh.from_group(groups, self.device.type, mesh=grid, mesh_dim_names=MESH_DIMS)


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int = 1,
    *,
    device: Device | None = None,
) -> ProcessGroupManager:
    """The call that users of Megatron-LM and vLLM know; dp takes what is left of the world."""
    model = tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size
    world = dist.get_world_size()
    if model < 1 or world % model:
        raise InputError(
            f"tp {tensor_model_parallel_size} x pp {pipeline_model_parallel_size} x cp {context_parallel_size} = "
            f"{model} does not divide the world of {world} ranks"
        )
    config = HybridParallelConfig(
        dp=world // model,
        tp=tensor_model_parallel_size,
        pp=pipeline_model_parallel_size,
        cp=context_parallel_size,
        ep=expert_model_parallel_size,
        expert_tp=expert_tensor_parallel_size,
        global_batch=world // model,
    )
    return ProcessGroupManager(config, device or Device("cpu", "gloo"))


def check_same_plan(digest: str, store: Store) -> None:
    """Fail on every rank, naming the ranks whose plan differs from rank 0's. Uses only the store, so that it works
    before any group exists and cannot hang in a collective that the plans disagree about."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generation = store.add(f"meshwright/plan/entered/{rank}", 1)
    scope = PrefixStore(f"meshwright/plan/{generation}", store)
    if rank == 0:
        scope.set("digest", digest)
    scope.wait(["digest"])
    if scope.get("digest").decode() != digest:
        scope.set(f"differing/{scope.add('differing', 1)}", str(rank))
    if scope.add("checked", 1) == world:
        scope.set("done", "1")
    scope.wait(["done"])
    differing = sorted(int(scope.get(f"differing/{i + 1}")) for i in range(scope.add("differing", 0)))
    if differing:
        names = ", ".join(str(r) for r in differing)
        raise InputError(f"rank {names} was started with a plan that differs from rank 0's; give all ranks one plan")


def _mesh_grid(layout: RankLayout) -> RankGroups:
    """Ranks as [zero_replica, zero_shard, pp, tp], wherever the order puts them."""
    config = layout.config
    dense = layout.dense.ranks.transpose([layout.dense.axes.index(axis) for axis in ("dp", "cp", "pp", "tp")])
    shards = config.zero_shards or config.dp * config.cp
    if config.dp * config.cp % shards:
        raise InputError(f"zero_shards={shards} does not divide dp x cp = {config.dp * config.cp} ranks")
    return dense.reshape(-1, shards, config.pp, config.tp)


def _rank_groups(layout: RankLayout) -> dict[str, RankGroups]:
    """Groups of every axis and combination as [groups, size]; the order here is the order of creation."""
    return {name: layout.groups(name) for name in LAYOUT_GROUPS}
