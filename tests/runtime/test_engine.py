"""The engine beyond parity: evaluation, precisions, clipping, loss scaling, buffers, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig, Precision, Schedule
from meshwright.runtime.engine import Engine, EngineOptions, build_engine
from meshwright.runtime.families import family_of
from meshwright.runtime.launch import Device, run_ranks
from meshwright.runtime.optimizer import LossScaler, OptimizerOptions
from meshwright.runtime.process_groups import ProcessGroupManager
from meshwright.runtime.state import LocalParameter
from meshwright.runtime.weights import SeededWeights

from .layouts import DUALPIPEV, INTERLEAVED, SEQ, layout
from .tiny import tiny

FAST = OptimizerOptions(learning_rate=3e-3, clip_norm=1.0)


def engine_of(config: HybridParallelConfig, **changes: Any) -> Engine:
    model = tiny(changes.pop("family", "llama"), **changes)
    groups = ProcessGroupManager(config, Device("cpu", "gloo"))
    return build_engine(
        config, model, groups, SeededWeights(model, family_of(model), 0), EngineOptions(seq=SEQ, optimizer=FAST)
    )


def own_batch(engine: Engine) -> tuple[torch.Tensor, torch.Tensor]:
    config = engine.config
    tokens = torch.randint(0, 96, (config.global_batch, SEQ + 1), generator=torch.Generator().manual_seed(1))
    per_rank = config.global_batch // config.dp
    rows = tokens[engine.groups.axis("dp").rank * per_rank :][:per_rank]
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def losses(config: HybridParallelConfig, steps: int) -> list[float]:
    engine = engine_of(config)
    batch = own_batch(engine)
    return [engine.step(*batch).loss for _ in range(steps)]


LAYOUTS = {
    "plain": layout(global_batch=4),
    "tp sp": layout(tp=2, sequence_parallel=True, global_batch=4),
    "zero2": layout(dp=2, zero=2, global_batch=4),
    "pp": layout(pp=2, global_batch=4),
}


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16])
def test_half_precision_follows_the_fp32_losses_on_every_axis(precision: Precision):
    exact = run_ranks(1, losses, replace(LAYOUTS["plain"], precision=Precision.FP32), 6)[0]
    assert exact[-1] < 0.95 * exact[0]
    for name, config in LAYOUTS.items():
        narrow = run_ranks(config.world_size, losses, replace(config, precision=precision), 6)
        assert all(ranks == narrow[0] for ranks in narrow), f"{name}: ranks report different losses"
        assert narrow[0] == pytest.approx(exact, rel=0.02), name


def weights_and_dtypes() -> tuple[set[str], set[str], set[str]]:
    engine = engine_of(layout(precision=Precision.BF16))
    engine.step(*own_batch(engine))
    drift = max(float((p.master - p.local.float()).abs().max()) for p in engine.parameters)
    assert 0 < drift < 0.01  # the masters keep what bf16 rounds away
    return (
        {str(p.local.dtype) for p in engine.parameters},
        {str(p.master.dtype) for p in engine.parameters},
        {str(p.gradient.dtype) for p in engine.parameters if p.gradient is not None},
    )


def test_narrow_weights_have_fp32_masters_and_gradients():
    assert run_ranks(1, weights_and_dtypes)[0] == ({"torch.bfloat16"}, {"torch.float32"}, {"torch.float32"})


def evaluate(config: HybridParallelConfig) -> tuple[float, float, int]:
    engine = engine_of(config)
    batch = own_batch(engine)
    before = engine.evaluate(*batch)
    assert all(p.live.grad is None for p in engine.parameters)
    return before, engine.step(*batch).loss, engine.evaluator.pool.created


@pytest.mark.parametrize(
    "config",
    [layout(pp=2, tp=2, sequence_parallel=True), layout(pp=2, **INTERLEAVED), layout(dp=2, zero=3)],
    ids=["pp tp sp", "interleaved", "zero3"],
)
def test_forward_only_gives_the_loss_that_the_next_step_reports(config: HybridParallelConfig):
    config = replace(config, precision=Precision.FP32)
    for before, trained, buffers in run_ranks(config.world_size, evaluate, config):
        assert before == pytest.approx(trained, rel=1e-6)
        assert buffers <= 4


def buffers_made(config: HybridParallelConfig) -> int:
    engine = engine_of(config)
    batch = own_batch(engine)
    engine.step(*batch)
    first = engine.executor.pool.created
    engine.step(*batch)
    assert engine.executor.pool.created == first, "a second step must reuse the buffers of the first"
    return first


def test_receive_buffers_are_reused_and_1f1b_needs_fewer_than_gpipe():
    few = run_ranks(2, buffers_made, layout(pp=2, global_batch=8))
    many = run_ranks(2, buffers_made, layout(pp=2, global_batch=8, schedule=Schedule.GPIPE))
    assert max(few) <= 4
    assert max(many) >= 8


def norms(config: HybridParallelConfig) -> float:
    engine = engine_of(config, kv_heads=1)
    return engine.step(*own_batch(engine)).gradient_norm


def test_the_gradient_norm_does_not_depend_on_the_layout():
    plain = run_ranks(1, norms, layout(global_batch=4, precision=Precision.FP32))[0]
    for config in (
        layout(dp=2, tp=2, sequence_parallel=True, zero=3, global_batch=4, precision=Precision.FP32),
        layout(pp=2, tp=2, global_batch=4, precision=Precision.FP32),
    ):
        assert run_ranks(config.world_size, norms, config) == pytest.approx([plain] * config.world_size, rel=1e-5)


def overflow() -> tuple[bool, float, float]:
    """An infinite gradient skips the step, halves the scale and leaves the weights alone."""
    engine = engine_of(layout(precision=Precision.FP16))
    assert engine.scaler is not None
    before = engine.scaler.scale
    weights = [p.local.clone() for p in engine.parameters]

    def spoil(parameter: LocalParameter) -> None:
        assert parameter.gradient is not None
        parameter.gradient[0] = float("inf")

    compute = engine.gradients

    def with_overflow(tokens: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
        result = compute(tokens, labels)
        spoil(engine.parameters[0])
        return result

    engine.gradients = with_overflow  # type: ignore[method-assign]
    result = engine.step(*own_batch(engine))
    unchanged = all(torch.equal(w, p.local) for w, p in zip(weights, engine.parameters, strict=True))
    assert unchanged
    return result.skipped, before, engine.scaler.scale


def test_an_overflow_in_fp16_skips_the_step_and_halves_the_scale():
    assert run_ranks(1, overflow)[0] == (True, 2.0**16, 2.0**15)


def test_the_loss_scale_doubles_after_enough_good_steps():
    scaler = LossScaler(scale=4.0, patience=2)
    assert [scaler.update(1.0), scaler.update(1.0), scaler.scale] == [True, True, 8.0]
    assert [scaler.update(float("nan")), scaler.scale] == [False, 4.0]


def test_the_learning_rate_warms_up_and_decays_to_its_final_fraction():
    options = OptimizerOptions(learning_rate=1.0, warmup_steps=4, total_steps=14, final_fraction=0.1)
    assert [options.rate(s) for s in (0, 3, 4)] == [0.25, 1.0, 1.0]
    assert options.rate(9) == pytest.approx(0.55)
    assert options.rate(14) == options.rate(100) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (layout(cp=3), "cp=3 needs a sequence that 2 x cp divides, not 16 tokens"),
        (layout(ep=2, dp=2), "the model has no experts: use ep=1, expert_tp=1"),
        (layout(precision=Precision.FP8), "precision fp8 cannot be trained"),
        (layout(pp=2, layer_split=(1, 1)), "layer_split .* sum to 4 layers; try .2, 2."),
        (layout(tp=3), "tp=3 does not divide 4 attention heads"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_the_users_words(config: HybridParallelConfig, message: str):
    with pytest.raises(InputError, match=message):
        run_ranks(config.world_size, engine_of, config)


def sinks_over_context() -> None:
    with pytest.raises(InputError, match=r"attention of its own \(sinks\): use cp=1"):
        engine_of(layout(cp=2), family="gpt_oss")


def evaluated(config: HybridParallelConfig) -> float:
    engine = engine_of(config, family="mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    return engine.evaluate(*own_batch(engine))


def test_the_load_balancing_loss_is_evaluated_the_same_over_stages():
    (one,), staged = run_ranks(1, evaluated, layout()), run_ranks(2, evaluated, layout(pp=2, **DUALPIPEV))
    assert staged == pytest.approx([one, one], rel=1e-5)
    (without,) = run_ranks(1, evaluated_without, layout())
    assert one > without + 0.1


def evaluated_without(config: HybridParallelConfig) -> float:
    engine = engine_of(config, family="mixtral")
    return engine.evaluate(*own_batch(engine))


def experts_that_do_not_divide() -> None:
    with pytest.raises(InputError, match=r"ep=2 does not divide 3 experts"):
        engine_of(layout(dp=2, ep=2), family="mixtral", num_local_experts=3)


@pytest.mark.parametrize("refused", [sinks_over_context, experts_that_do_not_divide])
def test_what_mixtures_of_experts_cannot_do_is_refused_in_one_line(refused: Callable[[], None]):
    run_ranks(2, refused)


def context_with_dropout() -> None:
    with pytest.raises(InputError, match=r"context parallelism runs without dropout.*attn_pdrop=0.1"):
        engine_of(layout(cp=2), family="gpt2", attn_pdrop=0.1)


def test_context_parallelism_with_dropout_is_refused():
    run_ranks(2, context_with_dropout)


def wrong_batch() -> None:
    engine = engine_of(layout())
    tokens, labels = own_batch(engine)
    with pytest.raises(InputError, match=r"batch must be \[4, 16\] tokens, got \[3, 16\]"):
        engine.step(tokens[:3], labels[:3])


def test_a_batch_of_the_wrong_shape_is_refused():
    run_ranks(1, wrong_batch)
