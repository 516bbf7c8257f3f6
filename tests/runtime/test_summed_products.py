"""Weight gradients of linear products are summed where they are made: autograd delivers only the others."""

from __future__ import annotations

import pytest
import torch

from meshwright.layout.config import HybridParallelConfig
from meshwright.runtime.data_parallel import PlainDataParallel
from meshwright.runtime.launch import run_ranks

from .layouts import layout
from .test_engine import engine_of, own_batch


def delivered_and_launched(
    config: HybridParallelConfig, tied: bool, family: str = "llama"
) -> tuple[set[str], list[bool]]:
    """The parameters that autograd brings a gradient of, and which buckets are under way when backward is over."""
    engine = engine_of(config, tie_word_embeddings=tied, family=family)
    data_parallel = engine.data_parallel
    assert isinstance(data_parallel, PlainDataParallel)
    delivered: set[str] = set()
    launched: list[bool] = []
    for parameter in engine.parameters:
        name = parameter.name.split(".")[-2]
        parameter.live.register_post_accumulate_grad_hook(lambda _live, name=name: delivered.add(name))
    finish = data_parallel.finish

    def watched() -> None:
        launched.extend(bucket.launched for bucket in data_parallel._buckets)
        finish()

    data_parallel.finish = watched
    engine.step(*own_batch(engine))
    return delivered, launched


NORMS = {"input_layernorm", "post_attention_layernorm", "norm"}


@pytest.mark.parametrize("sizes", [{"dp": 2}, {"tp": 2}, {"tp": 2, "sequence_parallel": True}])
def test_autograd_delivers_norms_and_the_embedding_only(sizes: dict[str, int]) -> None:
    for delivered, launched in run_ranks(2, delivered_and_launched, layout(global_batch=4, **sizes), False):
        assert delivered == NORMS | {"embed_tokens"}
        assert launched
        assert all(launched)  # the last product of a slice begins its reduction, as a gradient from autograd does


def test_a_head_that_shares_its_weight_leaves_the_sum_to_autograd() -> None:
    ((delivered, launched),) = run_ranks(1, delivered_and_launched, layout(global_batch=4), True)
    assert delivered == NORMS | {"embed_tokens"}  # the one weight of both
    assert all(launched)


def test_products_that_a_model_keeps_whole_are_left_to_autograd() -> None:
    """MLA's low-rank ones: the memory model counts their weight gradients."""
    ((delivered, _),) = run_ranks(1, delivered_and_launched, layout(global_batch=4), False, "deepseek_v3")
    assert delivered >= {"q_a_proj", "kv_a_proj_with_mqa"}
    assert not delivered & {"q_b_proj", "kv_b_proj", "o_proj"}


def no_graph_without_inputs_that_need_one() -> bool:
    engine = engine_of(layout())
    product = next(m for m in engine.chunks[0].modules() if type(m).__name__ == "RowParallelLinear")
    weight = product.get_parameter("weight")
    out = product(torch.ones(1, weight.shape[1], dtype=weight.dtype))
    return bool(out.requires_grad)


def test_products_of_inputs_without_gradient_are_left_to_autograd() -> None:
    assert run_ranks(1, no_graph_without_inputs_that_need_one) == [True]
