"""vLLM's grid: ExternalDP x DP x PP x PCP x TP, and EP = DP x PCP x TP within a stage, by its published reshape
(vllm/distributed/parallel_state.py, initialize_model_parallel)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.layout import HybridParallelConfig, rank_layout

small = st.integers(1, 4)


def published(external: int, dp: int, pp: int, pcp: int, tp: int) -> dict[str, list[list[int]]]:
    """Every group as vLLM makes it: the axis moved last, then rows."""
    ranks = np.arange(external * dp * pp * pcp * tp).reshape(external, dp, pp, pcp, tp)
    return {
        "tp": ranks.reshape(-1, tp).tolist(),
        "cp": ranks.swapaxes(3, 4).reshape(-1, pcp).tolist(),
        "pp": ranks.swapaxes(2, 4).reshape(-1, pp).tolist(),
        "dp": ranks.swapaxes(1, 4).reshape(-1, dp).tolist(),
        "ep": ranks.swapaxes(1, 2).reshape(-1, dp * pcp * tp).tolist(),
    }


@given(small, small, small, small, st.integers(1, 3))
def test_groups_are_those_of_the_published_reshape(external: int, dp: int, pp: int, tp: int, pcp: int):
    ep = dp * pcp * tp
    config = HybridParallelConfig(dp=external * dp, pp=pp, cp=pcp, tp=tp, ep=ep)
    layout = rank_layout(config, "vllm")
    expected = published(external if ep > 1 else 1, dp if ep > 1 else external * dp, pp, pcp, tp)
    for name in ("tp", "cp", "pp", "dp"):
        assert sorted(layout.groups(name).tolist()) == sorted(expected[name])
    if ep > 1:
        # the stages of one engine lie side by side here, the engines of one stage there: same groups
        assert sorted(layout.groups("ep").tolist()) == sorted(expected["ep"])


def test_documented_example_of_8_gpus_with_tp_2_and_pp_4():
    layout = rank_layout(HybridParallelConfig(tp=2, pp=4), "vllm")
    assert layout.groups("tp").tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.groups("pp").tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_experts_spread_over_dp_and_tp_of_one_stage():
    layout = rank_layout(HybridParallelConfig(dp=2, pp=2, tp=2, ep=4), "vllm")
    assert layout.groups("ep").tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert layout.coordinates(6)["dp"] == 1


def test_engines_that_share_no_experts_are_external():
    layout = rank_layout(HybridParallelConfig(dp=4, tp=2, ep=4), "vllm")
    assert layout.dense.sizes == {"external_dp": 2, "dp": 2, "pp": 1, "cp": 1, "tp": 2}
    assert layout.groups("ep").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert layout.groups("expert_dp").tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (HybridParallelConfig(dp=2, tp=2, expert_tp=2), "use expert_tp=1"),
        (HybridParallelConfig(dp=3, tp=4, ep=2), "ep=2 must be cp x tp = 4 times a divisor of dp=3"),
    ],
)
def test_expert_splits_that_vllm_lacks_are_refused(config: HybridParallelConfig, words: str):
    with pytest.raises(InputError, match=words):
        rank_layout(config, "vllm")
