"""Deliberate faults of the kinds that real frameworks shipped: parity must catch every one."""

from dataclasses import replace

from torch import Tensor
from torch.nn import functional

from meshwright.layout.config import HybridParallelConfig
from meshwright.runtime.data_parallel import PlainDataParallel
from meshwright.runtime.engine import Engine
from meshwright.runtime.parity import ParityJob, ParityReport, compare
from meshwright.runtime.parity_axes import compare_by_axis
from meshwright.runtime.slices import GradientSum
from meshwright.runtime.tensor_parallel import RowParallelLinear
from meshwright.runtime.tensor_parallel.linear import local

from .layouts import SEQ, layout
from .tiny import tiny


def run(config: HybridParallelConfig, fault, family: str = "llama", **model) -> ParityReport:
    report = compare(ParityJob(config, tiny(family, **model), SEQ, prepare=fault))
    assert not report.passed
    assert report.first_divergent is not None
    return report


def loss_of_every_microbatch_counts_whole(engine: Engine) -> None:
    run_schedule = engine.executor.run
    count = engine.executor.schedule.microbatches
    engine.executor.run = lambda microbatches, scale=1.0: run_schedule(microbatches, scale * count)  # type: ignore[method-assign]


def test_a_loss_not_divided_by_the_number_of_microbatches_is_caught():
    report = run(layout(pp=2, global_batch=3), loss_of_every_microbatch_counts_whole)
    assert 1.9 < report.worst_gradient < 2.1  # three times the gradient


def forget_to_sum_norms(engine: Engine) -> None:
    for parameter in engine.parameters:
        if "layernorm" in parameter.name:
            parameter.slice = replace(parameter.slice, gradient_sum=GradientSum.NONE)


def test_a_missed_sum_of_norm_gradients_is_caught_and_blamed_on_tp():
    job = ParityJob(layout(dp=2, tp=2, sequence_parallel=True), tiny("llama"), SEQ, prepare=forget_to_sum_norms)
    result = compare_by_axis(job)
    assert not result.whole.passed
    assert result.likely_cause == "tp"
    assert result.first_divergent is not None
    assert result.first_divergent.parameter == "model.layers.3.post_attention_layernorm.weight"
    assert result.first_divergent.copies == "replicated over tp"
    assert [c.report.passed for c in result.combinations] == [True, False, False]


def forget_to_sum_kv_heads(engine: Engine) -> None:
    for parameter in engine.parameters:
        if parameter.slice.gradient_sum is GradientSum.KV:
            parameter.slice = replace(parameter.slice, gradient_sum=GradientSum.NONE)


def test_missed_sums_of_replicated_kv_heads_are_caught():
    report = run(layout(tp=4), forget_to_sum_kv_heads)
    assert report.first_divergent is not None
    assert report.first_divergent.parameter.startswith("model.layers.3.self_attn.")
    assert "KV heads in copies" in report.first_divergent.copies


def average_over_pipeline(engine: Engine) -> None:
    assert isinstance(engine.data_parallel, PlainDataParallel)
    engine.data_parallel.axis = engine.groups.axis("tp")


def test_gradients_averaged_over_the_wrong_group_are_caught():
    run(layout(dp=2, tp=2), average_over_pipeline)


def add_bias_on_every_rank(engine: Engine) -> None:
    def forward(linear: RowParallelLinear, split: Tensor) -> Tensor:
        bias = None if linear.bias is None else local(linear.bias)
        return linear.region.leave(functional.linear(split, local(linear.weight).t(), bias))

    for module in engine.chunks.values():
        for part in module.modules():
            if isinstance(part, RowParallelLinear):
                part.forward = lambda split, own=part: forward(own, split)  # type: ignore[method-assign]


def test_a_bias_added_by_every_tp_rank_is_caught():
    run(layout(tp=2), add_bias_on_every_rank, "gpt2")


def swap_tied_sum(engine: Engine) -> None:
    for parameter in engine.parameters:
        parameter.tied = False


def test_tied_embeddings_that_drift_apart_are_caught():
    report = run(layout(pp=2), swap_tied_sum, tie_word_embeddings=True)
    assert report.first_divergent is not None
    assert report.first_divergent.parameter == "model.embed_tokens.weight"
