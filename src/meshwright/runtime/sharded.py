"""ZeRO-1, 2, 3 and HSDP by FSDP2 over a stage's chunks, with its collectives recorded and its timing under our control.

    ZeRO-1  weights gathered once per step, gradients reduce-scattered in the last backward pass only
    ZeRO-2  weights gathered once per step, gradients reduce-scattered in every backward pass
    ZeRO-3  weights gathered before and freed after every forward and backward pass
Each decoder layer is one unit, its routed experts one of their own over their own replicas; embedding, final norm and
head of a chunk are another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor, Shard

from meshwright.ledger import Collective
from meshwright.runtime.collectives import tensor_bytes
from meshwright.runtime.expert_parallel import ExpertParallelMoE
from meshwright.runtime.process_groups import AxisGroup, ProcessGroupManager
from meshwright.runtime.stage import StageModule
from meshwright.runtime.state import LocalParameter, local_tensor


class RecordedAllGather(AllGather):
    """FSDP2's all-gather of weights, written into the ledger."""

    def __init__(self, axis: AxisGroup, unit: str) -> None:
        self._axis = axis
        self._unit = unit

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        call, subject = None, f"{self._unit} parameters"
        if self._axis.size > 1:
            size, dtype = tensor_bytes(output_tensor), output_tensor.dtype
            call = self._axis.record(Collective.ALL_GATHER, subject, size, dtype, asynchronous=async_op)
        with self._axis.waiting():
            work = dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)
        return None if work is None else self._axis.under_way(work, call)


class RecordedReduceScatter(ReduceScatter):
    """FSDP2's reduce-scatter of gradients, written into the ledger, and under HSDP the all-reduce that follows it."""

    def __init__(self, axis: AxisGroup, replicas: AxisGroup, unit: str) -> None:
        self._axis = axis
        self._unit = unit
        self._replicas = replicas

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        if self._axis.size > 1:
            self._axis.record(
                Collective.REDUCE_SCATTER, f"{self._unit} gradients", tensor_bytes(input_tensor), input_tensor.dtype
            )
        if self._replicas.size > 1:
            subject = f"{self._unit} gradient shards"
            self._replicas.record(Collective.ALL_REDUCE, subject, tensor_bytes(output_tensor), output_tensor.dtype)
        with self._axis.waiting():
            return dist.reduce_scatter_single(
                output_tensor,
                input_tensor,
                op=op,  # pyright: ignore[reportArgumentType]
                group=group,
                async_op=async_op,
            )


def shard_mesh(groups: ProcessGroupManager) -> DeviceMesh:
    """The mesh FSDP2 shards over: dp x cp, with replicas as an outer dim where there are any (HSDP)."""
    if groups.axis("zero_replica").size > 1:
        return groups.mesh["zero_replica", "zero_shard"]
    return groups.mesh["zero_shard"]


def expert_mesh(groups: ProcessGroupManager) -> DeviceMesh:
    """The same for routed experts, whose replicas are the expert_dp ranks."""
    shard, replica = groups.axis("expert_shard"), groups.axis("expert_replica")
    ranks = torch.tensor(groups.axis("expert_dp").ranks).view(replica.size, shard.size)
    names = ("expert_replica", "expert_shard")
    mesh = DeviceMesh.from_group([replica.group, shard.group], groups.device.type, mesh=ranks, mesh_dim_names=names)
    return mesh if replica.size > 1 else mesh["expert_shard"]


def shard_dim(local_shape: Sequence[int], shards: int, of_experts: bool) -> int:
    """The dim that FSDP2 cuts: the first. Experts, and tensors with fewer rows than ranks (a shared expert's gate), are
    cut along the next that divides evenly if the first does not: padding would travel."""
    if not local_shape or local_shape[0] % shards == 0 or (local_shape[0] >= shards and not of_experts):
        return 0
    return next((dim for dim, length in enumerate(local_shape) if length % shards == 0), 0)


def shard_chunk(module: StageModule, groups: ProcessGroupManager, zero: int, compute: torch.dtype | None) -> None:
    """Apply FSDP2 to a chunk in place. `compute`: dtype of gathered weights (None: as stored)."""
    mesh = shard_mesh(groups)
    precise = None if compute is None else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=precise, cast_forward_inputs=False)
    reshard = zero >= 3

    def shard(part: nn.Module, over: DeviceMesh, ways: int, of_experts: bool = False) -> None:
        fully_shard(
            part,
            mesh=over,
            mp_policy=policy,
            reshard_after_forward=reshard,
            shard_placement_fn=lambda p: Shard(shard_dim(local_tensor(p).shape, ways, of_experts)),
        )

    mixtures = [part for part in module.modules() if isinstance(part, ExpertParallelMoE)]
    if mixtures:
        of_experts = expert_mesh(groups)
        for part in mixtures:
            shard(part, of_experts, groups.axis("expert_shard").size, of_experts=True)
    for part in (*module.layers.values(), module):
        shard(part, mesh, groups.axis("zero_shard").size)
    _record(module, groups)


def _record(module: StageModule, groups: ProcessGroupManager) -> None:
    """FSDP2's collectives of every unit go through recorded ones."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            of_experts = isinstance(unit, ExpertParallelMoE)
            name = "expert" if of_experts else "ends" if unit is module else "layer"
            kind = "expert" if of_experts else "zero"
            shards, replicas = groups.axis(f"{kind}_shard"), groups.axis(f"{kind}_replica")
            unit.set_custom_all_gather(RecordedAllGather(shards, name))
            unit.set_custom_reduce_scatter(RecordedReduceScatter(shards, replicas, name))


class ShardedDataParallel:
    """The same calls per step as PlainDataParallel, over FSDP2 modules."""

    def __init__(self, parameters: Sequence[LocalParameter], chunks: dict[int, StageModule], zero: int) -> None:
        self._parameters = list(parameters)
        self._chunks = chunks
        self._zero = zero
        self._gathered: dict[int, FSDPParam] = {}

    def begin(self) -> None:
        for parameter in self._parameters:
            parameter.live.grad = None
            parameter.gradient = None

    def before_backward(self, chunk: int, last: bool, split: bool = False) -> None:
        """`split`: the pass leaves weight gradients for later, so nothing can be reduced at its end."""
        module = self._chunks[chunk]
        assert isinstance(module, FSDPModule)
        _release_reduced(module)
        last = last and not split
        module.set_is_last_backward(last)
        module.set_requires_gradient_sync(not split and (self._zero >= 2 or last))
        module.set_reshard_after_backward(self._zero >= 3 or last)

    def accumulate(self, live: Tensor, gradient: Tensor) -> None:
        """Add a weight gradient that backward left for later. `live` is the gathered parameter of the forward pass.
        Where FSDP2 reduces in another format than it computes in, it accumulates beside the parameter, in that of the
        sums."""
        owner = self._owner(live)
        before = owner.unsharded_accumulated_grad if owner.reduce_dtype else live.grad
        if before is not None:
            local_tensor(before).add_(gradient)
            return
        gradient = gradient.to(owner.reduce_dtype or gradient.dtype)
        if isinstance(live, DTensor):
            mesh, placements = live.device_mesh, live.placements
            gradient = DTensor.from_local(
                gradient, mesh, placements, run_check=False, shape=live.shape, stride=live.stride()
            )
        if owner.reduce_dtype:
            owner.unsharded_accumulated_grad = gradient
        else:
            live.grad = gradient

    def accumulate_product(self, live: Tensor, left: Tensor, right: Tensor) -> None:
        self.accumulate(live, left @ right)

    def after_weights(self, chunk: int, last: bool) -> None:
        """Reduce what one backward pass has left of a chunk, as FSDP2 does at the end of a pass. It has no public name
        for that: its own end-of-backward callback is run once more."""
        self.before_backward(chunk, last)
        module = self._chunks[chunk]
        assert isinstance(module, FSDPModule)
        if self._zero >= 2 or last:
            for parameter in sharded_parameters(module):
                _accumulate_in_one_format(parameter)
        # norms of this microbatch may have been reduced with the one before: the call stays the same size all the same
        module.set_reduce_scatter_unused_params(True)
        module._get_fsdp_state()._root_post_backward_final_callback()

    def _owner(self, live: Tensor) -> FSDPParam:
        """What FSDP2 keeps of a gathered parameter (which it makes once, when it first gathers it)."""
        if id(live) not in self._gathered:
            for module in self._chunks.values():
                self._gathered |= {id(p.unsharded_param): p for p in sharded_parameters(module) if _was_gathered(p)}
        return self._gathered[id(live)]

    def finish(self) -> None:
        for parameter in self._parameters:
            grad = parameter.live.grad
            parameter.gradient = torch.zeros_like(parameter.master) if grad is None else local_tensor(grad)


def sharded_parameters(module: nn.Module) -> Iterator[FSDPParam]:
    """FSDP2's own record of every parameter in a chunk."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            for group in unit._get_fsdp_state()._fsdp_param_groups:
                yield from group.fsdp_params


def _was_gathered(parameter: FSDPParam) -> bool:
    return hasattr(parameter, "_unsharded_param")


def _accumulate_in_one_format(parameter: FSDPParam) -> None:
    """FSDP2 reduces a unit in one call and wants one format in it. Gradients that came with the inputs (norms) may
    still be as they were computed, and zeros for those that were reduced a microbatch early would be."""
    if parameter.reduce_dtype is None or not _was_gathered(parameter):
        return
    live, precise = parameter.unsharded_param, parameter.reduce_dtype
    if parameter.unsharded_accumulated_grad is None and live.grad is None:
        parameter.unsharded_accumulated_grad = torch.zeros_like(live, dtype=precise)
    elif parameter.unsharded_accumulated_grad is None:
        parameter.to_accumulated_grad_if_needed()


def _release_reduced(module: FSDPModule) -> None:
    """Let go of the input of the last reduce-scatter, a unit's gradients in fp32: FSDP2 keeps it until the next one,
    all through the next backward pass of the head, unless it is told that the step ends. By now the call is long
    over."""
    state = module._get_fsdp_state()
    for reduced in state._comm_ctx.reduce_scatter_states:
        if reduced.event is not None and state._device_handle is not None:
            state._device_handle.current_stream().wait_event(reduced.event)
    state._comm_ctx.reduce_scatter_states.clear()
