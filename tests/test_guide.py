"""The guide's names do the real thing: its own cases, and what its formulas got wrong."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import meshwright
from meshwright import (
    HybridParallelConfig,
    InputError,
    Workload,
    analyze_communication_volume,
    analyze_memory_usage,
    estimate,
    latency_optimized_strategy,
    memory_constrained_strategy,
    model_scaling_efficiency,
    recommend_parallelism_config,
    throughput_optimized_strategy,
)
from meshwright.guide import Recommendation

GIB = 2**30


def assert_real(choice: Recommendation, num_gpus: int) -> None:
    """The split exists on these GPUs and fits, by an estimate made anew."""
    tp, pp, dp = choice
    assert tp * pp * dp == choice.total_gpus <= num_gpus
    mixer = choice.model.kinds[0].mixer
    assert mixer is not None
    assert mixer.heads % tp == 0
    assert pp <= choice.model.num_layers
    again = estimate(choice.model, choice.cluster, Workload(seq=2048), choice.best.config)
    assert again.memory.fits
    assert again.memory.peak.total_bytes <= choice.cluster.accelerator.memory_bytes


@pytest.mark.parametrize(
    ("params_b", "gpus", "interconnect", "depth"),
    [(70, 32, "nvlink", 80), (175, 128, "infiniband", 96), (13, 8, "nvlink", 40), (7, 8, "ethernet", 32)],
)
def test_recommended_sizes_multiply_divide_and_fit(params_b: float, gpus: int, interconnect: str, depth: int) -> None:
    choice = recommend_parallelism_config(
        model_params_b=params_b,
        num_gpus=gpus,
        gpu_memory_gb=80,
        gpu_interconnect=interconnect,
        model_depth=depth,
    )
    assert_real(choice, gpus)
    assert choice.model.num_layers == depth
    assert choice.model.parameters == pytest.approx(params_b * 1e9, rel=0.05)
    assert 0 < choice.efficiency < 1
    assert choice.total_gpus == gpus
    assert str(choice.tp_size) in str(choice)


def test_the_recommendation_is_the_fastest_of_those_it_names() -> None:
    choice = recommend_parallelism_config(70, 32, 80, "nvlink", 80)
    steps = [choice.best.time.step_s, *(other.time.step_s for other in choice.runners_up)]
    assert steps == sorted(steps)
    assert len(steps) > 1


def test_what_the_guide_recommends_for_70b_on_32_gpus_does_not_fit() -> None:
    """The guide says tp 4, pp 1, dp 8: 70e9 parameters / 4 x 16 bytes of Adam state alone are 280 GB."""
    choice = recommend_parallelism_config(70, 32, 80, "nvlink", 80)
    textbook = HybridParallelConfig(dp=8, tp=4, pp=1, global_batch=256)
    assert not estimate(choice.model, choice.cluster, Workload(seq=2048), textbook).memory.fits


def test_gpus_that_fill_no_node_are_left_out_and_counted() -> None:
    choice = recommend_parallelism_config(7, 13, 80, "nvlink", 32)
    assert (choice.total_gpus, choice.unused_gpus) == (8, 5)


def test_a_model_that_fits_nowhere_is_refused_with_what_would() -> None:
    with pytest.raises(InputError, match=r"nothing fits.*GiB too much.*GPUs instead of 8"):
        recommend_parallelism_config(175, 8, 80, "nvlink", 96)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"gpu_interconnect": "carrier pigeon"}, "nvlink, infiniband or ethernet"),
        ({"num_gpus": 0}, "num_gpus must be 1 or more"),
        ({"model_params_b": -1}, "billion parameters"),
        ({"gpu_memory_gb": 0}, "gpu_memory_gb"),
        ({"model_depth": 0}, "layers must be"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(changed: dict[str, object], words: str) -> None:
    question = {"model_params_b": 70, "num_gpus": 32, "gpu_memory_gb": 80, "gpu_interconnect": "nvlink",
                "model_depth": 80}  # fmt: skip
    with pytest.raises(InputError, match=words):
        recommend_parallelism_config(**{**question, **changed})  # type: ignore[arg-type]


GUIDE_JOB = {"model_params_b": 70, "batch_size": 32, "seq_length": 2048, "hidden_dim": 8192, "num_layers": 80,
             "tp_size": 4, "pp_size": 2}  # fmt: skip


def test_memory_has_the_guides_keys_and_its_totals_are_the_sums_of_the_parts() -> None:
    usage = analyze_memory_usage(**GUIDE_JOB)  # type: ignore[arg-type]
    training = ("param", "gradient", "optimizer", "activation", "logits", "buffer", "reserved")
    assert usage["total_training"] == pytest.approx(sum(usage[f"{kind}_memory"] for kind in training))
    inference = usage["kv_cache_memory"] + usage["workspace_memory"] + usage["context_memory"]
    assert usage["total_inference"] == pytest.approx(inference + usage.inference.weights_bytes / 1e9)
    assert dict(usage).keys() >= {"param_memory", "activation_memory", "kv_cache_memory", "optimizer_memory"}
    assert len(usage) == len(dict(usage))


def test_parameters_gradients_and_adam_state_have_their_real_sizes() -> None:
    usage = analyze_memory_usage(**GUIDE_JOB)  # type: ignore[arg-type]
    per_gpu_b = 70 / 8
    assert usage["param_memory"] == pytest.approx(per_gpu_b * 2, rel=0.03)
    assert usage["gradient_memory"] == pytest.approx(per_gpu_b * 4, rel=0.03)  # the guide has none
    assert usage["optimizer_memory"] == pytest.approx(per_gpu_b * 12, rel=0.03)  # master, momentum, variance in fp32


def test_the_kv_cache_counts_every_layer_of_the_stage() -> None:
    """32 sequences x 2048 tokens x 40 layers x 2 x (8 KV heads / tp 4) x 128 x 2 bytes; the guide: no layers."""
    usage = analyze_memory_usage(**GUIDE_JOB)  # type: ignore[arg-type]
    assert usage["kv_cache_memory"] == pytest.approx(32 * 2048 * 40 * 2 * 2 * 128 * 2 / 1e9, rel=0.01)


def test_microbatches_and_recompute_make_activations_smaller() -> None:
    whole = analyze_memory_usage(**GUIDE_JOB)  # type: ignore[arg-type]
    cut = analyze_memory_usage(**GUIDE_JOB, num_micro_batches=32)  # type: ignore[arg-type]
    lean = analyze_memory_usage(**GUIDE_JOB, num_micro_batches=32, recompute="full")  # type: ignore[arg-type]
    assert whole["activation_memory"] > cut["activation_memory"] > lean["activation_memory"] > 0


def test_communication_volume_follows_the_sizes() -> None:
    job = {"batch_size": 32, "seq_length": 2048, "hidden_dim": 8192, "num_layers": 80, "tp_size": 4, "pp_size": 2,
           "dp_size": 4, "num_micro_batches": 8}  # fmt: skip
    volume = analyze_communication_volume(**job)
    assert volume["total_comm"] == pytest.approx(volume["tp_total_comm"] + volume["pp_total_comm"] + volume["dp_comm"])
    assert sum(volume.shares.values()) == pytest.approx(1)
    # tp: 2 all-reduces a layer and pass of (batch / dp) x seq x hidden bf16, 40 layers on a stage
    layers = 2 * 2 * 40 * (32 // 4) * 2048 * 8192 * 2
    assert volume["tp_total_comm"] == pytest.approx(layers / 1e9, rel=0.02)
    # dp: fp32 gradients of the rank's eighth of the model, not of all of it
    assert volume["dp_comm"] == pytest.approx(volume_of_gradients(), rel=0.05)
    assert analyze_communication_volume(**{**job, "dp_size": 1, "num_micro_batches": 32})["dp_comm"] < 1e-6


def volume_of_gradients() -> float:
    return 69.7e9 / 8 * 4 / 1e9


def test_a_single_gpu_sends_nothing() -> None:
    volume = analyze_communication_volume(8, 512, 4096, 32, 1, 1, 1, 8)
    assert volume["total_comm"] == 0
    assert set(volume.shares.values()) == {0.0}


def test_batches_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match="not a multiple"):
        analyze_communication_volume(33, 2048, 8192, 80, 4, 2, 4, 8)
    with pytest.raises(InputError, match="not a multiple"):
        analyze_memory_usage(**{**GUIDE_JOB, "num_micro_batches": 5})  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [(2, 1, 1, 4), (4, 1, 1, 4), (2, 2, 1, 8), (4, 2, 1, 8), (4, 2, 2, 8)])
def test_scaling_efficiency_splits_into_its_axes(sizes: tuple[int, int, int, int]) -> None:
    tp, pp, dp, _ = sizes
    result = model_scaling_efficiency(*sizes)
    assert float(result) == pytest.approx(result.tp * result.pp * result.dp)
    assert 0.3 < float(result) <= 1
    assert result.ideal == tp * pp * dp
    assert result.actual == pytest.approx(result.ideal * float(result))
    assert (result.pp == pytest.approx(1)) == (pp == 1)
    assert (result.tp == pytest.approx(1)) == (tp == 1)


def test_more_microbatches_fill_the_pipeline() -> None:
    few, many = (model_scaling_efficiency(1, 4, 1, m) for m in (4, 32))
    parts = few.estimate.time.parts_s  # of the step without the optimizer, which no pipeline idles in
    busy, idle = sum(parts[name] for name in ("forward", "backward", "host", "pp")), parts["bubble"]
    ideal = 4 / (4 + 3)  # m / (m + p - 1), but for the uneven last stage
    assert busy / (busy + idle) == pytest.approx(ideal, rel=0.05)
    assert many.pp > few.pp


def test_the_memory_strategy_leaves_more_free_than_the_throughput_one() -> None:
    lean = memory_constrained_strategy(model_size_gb=140, available_memory_gb=80, num_gpus=64)
    assert_real(lean, 64)
    fast = recommend_parallelism_config(70, 64, 80, "nvlink", lean.model.num_layers)
    assert lean.best.memory.peak.total_bytes < fast.best.memory.peak.total_bytes
    assert lean.best.time.step_s <= fast.best.time.step_s / 0.9 * 1.02


@pytest.mark.parametrize("interconnect", ["nvlink", "infiniband", "ethernet"])
def test_the_throughput_strategy_fits_on_every_interconnect(interconnect: str) -> None:
    assert_real(throughput_optimized_strategy(64, interconnect, 48), 64)


@pytest.mark.parametrize(("gpus", "fits"), [(8, True), (8, False), (64, False), (1, True)])
def test_the_latency_strategy_divides_the_heads_and_stays_in_the_fast_domain(gpus: int, fits: bool) -> None:
    choice = latency_optimized_strategy(gpus, fits)
    tp, pp, dp = choice
    assert tp <= 8
    assert tp * pp * dp <= gpus
    mixer = choice.model.kinds[0].mixer
    assert mixer is not None
    assert mixer.heads % tp == 0
    assert choice.best.fits
    assert choice.best.tpot_s == min(one.tpot_s for one in choice.tried if one.fits)


def test_a_model_that_fits_one_gpu_is_still_faster_on_several() -> None:
    tp, _, _ = latency_optimized_strategy(8, True)
    assert tp > 1


def test_every_public_name_can_be_imported() -> None:
    for name in meshwright.__all__:
        assert getattr(meshwright, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = meshwright.nonsense


def test_importing_meshwright_loads_nothing_heavy() -> None:
    script = "import sys, meshwright; print([m for m in ('numpy', 'torch', 'pydantic', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [(None, 32, 80, "nvlink", 80), ("70", 32, 80, "nvlink", 80), (70, 32, "80", "nvlink", 80), (70, 32, 80, None, 80),
     (70, "32", 80, "nvlink", 80), (70, 32, 80, "nvlink", "80"), (float("nan"), 32, 80, "nvlink", 80)],
)  # fmt: skip
def test_arguments_of_the_wrong_kind_are_one_line(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(InputError):
        recommend_parallelism_config(*arguments)
