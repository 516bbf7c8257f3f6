"""Compute prices: rooflines hold, work splits over tp, and the published per-layer times of a 22B model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.cost.candidates import Candidates
from meshwright.cost.compute import HeadTimes, LayerTimes, Shop, head_times, layer_times, shop
from meshwright.cost.device import Device, device_for, peak_flops
from meshwright.cost.gemm import Gemm
from meshwright.cost.stack import Stack, stack_for
from meshwright.cost.workload import Workload
from meshwright.errors import InputError
from meshwright.hardware.catalogue import builtin
from meshwright.hardware.load import accelerator
from meshwright.layout.config import HybridParallelConfig, Precision, Recompute
from meshwright.models.from_config import spec_from_config
from meshwright.models.spec import ModelSpec

H100 = accelerator("h100-80gb-sxm")
A100 = accelerator("a100-80gb-sxm")
HOPPER = device_for("hopper")


def gpt(hidden: int = 6144, heads: int = 64, layers: int = 48) -> ModelSpec:
    """A GPT of Korthikanti et al. 2022, table 3 (22B by default)."""
    return spec_from_config(
        {
            "model_type": "gpt_neox",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * hidden,
            "vocab_size": 51200,
            "max_position_embeddings": 2048,
        }
    )


def prices(stack: Stack, config: HybridParallelConfig, workload: Workload) -> Shop:
    """The prices of one configuration on an A100."""
    return shop(A100, device_for("ampere"), stack, workload, Candidates.from_configs([config]))


def times(config: HybridParallelConfig, workload: Workload, stack: Stack | None = None) -> tuple[LayerTimes, HeadTimes]:
    """Layer and head times of the 22B model."""
    x = prices(stack or stack_for("Megatron-LM"), config, workload)
    return layer_times(gpt(), x), head_times(gpt(), x)


sizes = st.integers(1, 512).map(lambda units: float(units * 64))


@settings(max_examples=200, deadline=None)
@given(m=sizes, n=sizes, k=sizes)
def test_no_product_beats_the_roofline(m: float, n: float, k: float) -> None:
    engine = Gemm.of(H100, HOPPER, peak_flops(H100, Precision.BF16), HOPPER.gemm, 2.0)
    seconds = float(engine.seconds(np.array([m]), np.array([n]), np.array([k]))[0])
    assert seconds >= 2 * m * n * k / 989.4e12
    assert seconds >= 2 * (m * k + k * n + m * n) / H100.memory_bandwidth


@settings(max_examples=100, deadline=None)
@given(m=sizes, n=sizes, k=sizes)
def test_a_larger_product_takes_no_less_time(m: float, n: float, k: float) -> None:
    engine = Gemm.of(H100, HOPPER, peak_flops(H100, Precision.BF16), HOPPER.gemm, 2.0)
    base = engine.seconds(np.array([m]), np.array([n]), np.array([k]))
    for grown in ((2 * m, n, k), (m, 2 * n, k), (m, n, 2 * k)):
        assert (engine.seconds(*(np.array([g]) for g in grown)) >= base).all()


def test_a_tile_beyond_a_full_wave_costs_part_of_another_wave() -> None:
    device = Device(tiles=((128, 128),), quantisation=1.0, launch_s=0.0)
    engine = Gemm.of(H100, device, 989.4e12, 1.0, 2.0)
    m, k = np.array([128.0 * 132]), np.array([8192.0])
    eight, more = (float(engine.seconds(m, np.array([n]), k)[0]) for n in (1024.0, 1024.0 + 64))
    assert more == pytest.approx(eight * 9 / 8)


def test_a_format_without_units_is_an_input_error() -> None:
    with pytest.raises(InputError, match="fp8"):
        peak_flops(A100, Precision.FP8)


def test_tensor_parallelism_divides_a_layer_but_not_perfectly() -> None:
    alone, _ = times(HybridParallelConfig(micro_batch=4, global_batch=4), Workload(2048))
    split, _ = times(HybridParallelConfig(tp=8, micro_batch=4, global_batch=4), Workload(2048))
    assert alone.forward[0, 0] / 8 < split.forward[0, 0] < alone.forward[0, 0] / 4


def test_context_parallelism_halves_a_long_layer() -> None:
    workload = Workload(131072)
    alone, _ = times(HybridParallelConfig(tp=8), workload)
    split, _ = times(HybridParallelConfig(tp=8, cp=2), workload)
    assert split.forward[0, 0] == pytest.approx(alone.forward[0, 0] / 2, rel=0.02)


def test_full_recompute_runs_the_forward_pass_again() -> None:
    config = HybridParallelConfig(tp=8, micro_batch=4, global_batch=4, recompute=Recompute.FULL)
    layer, _ = times(config, Workload(2048))
    assert layer.recompute[0, 0] == layer.forward[0, 0]
    half, _ = times(replace(config, recompute_every=2), Workload(2048))
    assert half.recompute[0, 0] == pytest.approx(layer.forward[0, 0] / 2)


def test_selective_recompute_costs_less_than_full() -> None:
    config = HybridParallelConfig(tp=8, micro_batch=4, global_batch=4, recompute=Recompute.SELECTIVE)
    layer, _ = times(config, Workload(2048, flash_attention=False))
    assert 0 < layer.recompute[0, 0] < 0.4 * layer.forward[0, 0]


def test_head_costs_more_with_a_larger_vocabulary() -> None:
    x = prices(stack_for("Megatron-LM"), HybridParallelConfig(tp=8, micro_batch=4, global_batch=4), Workload(2048))
    small, large = head_times(gpt(), x), head_times(replace(gpt(), vocab=4 * 51200), x)
    assert large.forward[0] > 3 * small.forward[0]


def test_a_layer_of_22b_takes_the_published_time() -> None:
    """Korthikanti et al. 2022, table 4: 7.7 ms forward and 11.9 ms backward per layer (A100, tp 8, micro batch 4,
    communication included: two all-reduces of 100 MB each way, about 0.8 ms each)."""
    config = HybridParallelConfig(tp=8, micro_batch=4, global_batch=4)
    layer, _ = times(config, Workload(2048, flash_attention=False, dropout=True))
    assert layer.forward[0, 0] == pytest.approx(6.1e-3, rel=0.2)
    assert layer.backward[0, 0] == pytest.approx(10.3e-3, rel=0.3)


def test_a_generation_without_runs_of_its_own_reaches_what_the_one_before_it_did() -> None:
    before, refined = device_for("cdna3"), device_for("cdna4")
    assert refined.name == "cdna4"
    assert (refined.gemm, refined.gemm_fp8, refined.attention) == (before.gemm, before.gemm_fp8, before.attention)
    assert device_for("blackwell-ultra", fitted=False).gemm == device_for("blackwell", fitted=False).gemm


def test_every_catalogued_architecture_has_constants_of_its_own() -> None:
    used = {chip.architecture for chip in builtin().accelerators.values()}
    assert {architecture for architecture in used if device_for(architecture).name != architecture} == set()
