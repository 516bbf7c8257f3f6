"""The groups of every axis, their accessors, the plan check and the recorder they carry."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig
from meshwright.runtime.launch import Device, run_ranks
from meshwright.runtime.process_groups import ProcessGroupManager, check_same_plan, initialize_model_parallel

CPU = Device("cpu", "gloo")


def describe(config: HybridParallelConfig) -> dict[str, tuple[int, ...]]:
    groups = ProcessGroupManager(config, CPU)
    found = {}
    for name in groups.axes:
        axis = groups.axis(name)
        value = torch.tensor([2.0 ** dist.get_rank()])
        dist.all_reduce(value, group=axis.group)
        assert int(value) == sum(2**r for r in axis.ranks), f"{name} reduces over other ranks than it says"
        assert axis.ranks[axis.rank] == dist.get_rank()
        found[name] = axis.ranks
    assert groups.mesh["tp"].mesh.tolist() == list(groups.axis("tp").ranks)
    groups.close()
    return found


def test_groups_of_each_axis_partition_the_world_and_reduce_over_the_ranks_they_name():
    config = HybridParallelConfig(dp=2, pp=2, tp=2, zero=3, zero_shards=1, ep=2, global_batch=2)
    found = run_ranks(8, describe, config)
    for axis in found[0]:
        members = [ranks[axis] for ranks in found]
        assert all(rank in members[rank] for rank in range(8))
        assert sorted(r for group in set(members) for r in group) == list(range(8))
    assert found[0]["tp"] == (0, 1)
    assert found[0]["pp"] == (0, 2)
    assert found[0]["dp"] == (0, 4)
    assert found[0]["zero_shard"] == (0,)
    assert found[0]["zero_replica"] == (0, 4)
    assert found[0]["model"] == (0, 1, 2, 3)
    assert found[0]["ep"] == (0, 1)
    assert found[0]["expert_dp"] == (0, 4)


def tp_and_pp_ranks(order: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    groups = ProcessGroupManager(HybridParallelConfig(dp=2, pp=2, tp=2, global_batch=2), CPU, order=order)
    assert groups.mesh["pp"].mesh.tolist() == list(groups.axis("pp").ranks)
    return tuple(groups.axis(axis).ranks for axis in ("tp", "pp", "dp"))  # type: ignore[return-value]


def test_ranks_can_be_laid_out_in_megatrons_order():
    assert run_ranks(8, tp_and_pp_ranks, "megatron")[0] == ((0, 1), (0, 4), (0, 2))


def embedding_group() -> tuple[int, ...] | None:
    config = HybridParallelConfig(pp=4, global_batch=1)
    groups = ProcessGroupManager(config, CPU)
    return groups.axis("embedding").ranks if "embedding" in groups.axes else None


def test_only_first_and_last_stage_share_an_embedding_group():
    assert run_ranks(4, embedding_group) == [(0, 3), None, None, (0, 3)]


def named_accessors() -> tuple[int, ...]:
    groups = initialize_model_parallel(2, 2)
    sizes = (
        groups.get_tensor_parallel_world_size(),
        groups.get_pipeline_parallel_world_size(),
        groups.get_data_parallel_world_size(),
    )
    assert dist.get_world_size(groups.get_tensor_parallel_group()) == 2
    kv = groups.split_axis("kv", "tp", 2)
    assert kv.ranks == groups.axis("tp").ranks
    return (*sizes, groups.get_tensor_parallel_rank(), groups.get_pipeline_parallel_rank())


def test_the_names_of_the_guide_and_of_megatron_work():
    assert run_ranks(4, named_accessors) == [(2, 2, 1, 0, 0), (2, 2, 1, 1, 0), (2, 2, 1, 0, 1), (2, 2, 1, 1, 1)]


def too_many() -> None:
    with pytest.raises(InputError, match="3 does not divide the world of 2 ranks"):
        initialize_model_parallel(3)


def test_a_size_that_does_not_divide_the_world_is_refused():
    run_ranks(2, too_many)


def check(digests: list[str]) -> None:
    check_same_plan("same", _get_default_store())
    check_same_plan(digests[dist.get_rank()], _get_default_store())


def test_a_rank_with_another_plan_is_named():
    run_ranks(3, check, ["a", "a", "a"])
    with pytest.raises(InputError, match="rank 2 was started with a plan that differs"):
        run_ranks(3, check, ["a", "a", "b"])
