"""A config is consistent in itself or is refused in the user's words."""

from dataclasses import replace

import numpy as np
import pytest

from meshwright.errors import InputError
from meshwright.layout import HybridParallelConfig, Precision, Recompute, Schedule

SIZES = ("dp", "tp", "pp", "cp", "ep", "expert_tp", "vpp", "micro_batch", "global_batch", "recompute_every")


@pytest.mark.parametrize("name", [*SIZES, "zero_shards"])
@pytest.mark.parametrize("value", [0, -1, -(10**40), 10**40, True, "8", 2.0, float("nan"), [1]])
def test_sizes_of_zero_negative_huge_or_of_another_type_are_refused(name: str, value: object):
    with pytest.raises(InputError, match=f"^{name} must be (a whole number|between 1 and)") as error:
        HybridParallelConfig(**{name: value})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 150


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dp": 3, "global_batch": 10}, "10 is not a multiple of dp=3 x micro batch 1 = 3; try 9 or 12"),
        ({"dp": 4, "global_batch": 2}, "try 4$"),
        ({"dp": 4, "ep": 3}, "ep=3 x expert_tp=1 must divide the dp x cp x tp = 4 ranks of a stage; try ep 2 or 4"),
        ({"tp": 4, "expert_tp": 8}, "must divide"),
        ({"vpp": 2}, "vpp=2 needs schedule interleaved-1f1b"),
        ({"vpp": 2, "schedule": Schedule.INTERLEAVED}, "needs a pipeline"),
        ({"pp": 2, "schedule": Schedule.INTERLEAVED}, "use vpp=2"),
        ({"pp": 2, "schedule": Schedule.ZBV}, "use vpp=2, not vpp=1"),
        ({"pp": 2, "vpp": 3, "schedule": "dualpipev"}, "use vpp=2, not vpp=3"),
        ({"zero": 4}, "zero must be between 0 and 3"),
        ({"zero": True}, "zero must be a whole number"),
        ({"dp": 4, "zero": 1, "zero_shards": 3}, "zero_shards=3 must divide dp x cp = 4; try 2 or 4"),
        ({"pp": 2, "layer_split": (4,)}, "layer_split names 1 chunks, but pp=2 x vpp=1 has 2"),
        ({"layer_split": (-1,)}, "layer_split must be between 0"),
        ({"schedule": "zbw"}, "unknown schedule 'zbw' .did you mean zbv"),
        ({"recompute": "some"}, "unknown recompute 'some'"),
        ({"precision": "bf15"}, "did you mean bf16"),
        ({"sequence_parallel": 1}, "sequence_parallel must be true or false"),
        ({"dp": 4000, "tp": 4000}, "16000000 ranks; at most 10,000,000"),
    ],
)
def test_inconsistent_configs_are_refused_with_the_nearest_valid_values(fields: dict[str, object], words: str):
    with pytest.raises(InputError, match=words) as error:
        HybridParallelConfig(**fields)
    assert "\n" not in str(error.value)


def test_consistent_configs_of_every_schedule_are_accepted():
    for schedule in Schedule:
        vpp = {"interleaved-1f1b": 3, "zbv": 2, "dualpipev": 2}.get(schedule, 1)
        config = HybridParallelConfig(pp=4, vpp=vpp, schedule=schedule, global_batch=8)
        assert config.num_microbatches == 8


def test_plain_strings_numpy_integers_and_lists_become_the_fields_own_types():
    config = HybridParallelConfig(
        dp=np.int64(2), tp=np.int32(4), schedule="gpipe", recompute="full", precision="fp8", layer_split=[4]
    )
    assert type(config.dp) is int
    assert type(config.tp) is int
    assert config.schedule is Schedule.GPIPE
    assert config.recompute is Recompute.FULL
    assert config.precision is Precision.FP8
    assert config.layer_split == (4,)


def test_default_global_batch_is_one_microbatch_for_each_replica_and_follows_dp():
    config = HybridParallelConfig(dp=4, micro_batch=2)
    assert config.global_batch == 8
    assert config.num_microbatches == 1
    assert replace(config, dp=8).global_batch == 16
    fixed = HybridParallelConfig(dp=4, global_batch=8)
    assert replace(fixed, dp=8).global_batch == 8
    with pytest.raises(InputError, match="global batch 8 is not a multiple of dp=3"):
        replace(fixed, dp=3)


def test_sequence_parallel_at_tp_1_and_shards_at_zero_0_do_nothing_and_are_allowed():
    assert HybridParallelConfig(sequence_parallel=True).world_size == 1
    assert HybridParallelConfig(dp=4, zero_shards=2).zero == 0


def test_visualize_prints_the_rank_map(capsys: pytest.CaptureFixture[str]):
    HybridParallelConfig.of(data_parallel_size=2, tensor_parallel_size=2).visualize()
    printed = capsys.readouterr().out
    assert "stage pp=0: [0 1]" in printed
    assert "stage pp=0: [2 3]" in printed
