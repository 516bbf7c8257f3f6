"""Per-stage and per-rank counts: nothing lost, nothing counted twice, the fullest rank is the fullest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig
from meshwright.models import ModelSpec, layer_parameters, load, per_rank_elements, rank_parameters, stage_parameters

GQA = {"model_type": "qwen3", "hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 4}
GQA |= {"intermediate_size": 50, "num_hidden_layers": 5, "vocab_size": 101}
MOE = {"model_type": "deepseek_v3", "hidden_size": 32, "num_attention_heads": 8, "q_lora_rank": 12, "kv_lora_rank": 8}
MOE |= {"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4, "intermediate_size": 40, "vocab_size": 97}
MOE |= {"n_routed_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 10, "n_shared_experts": 1}
MOE |= {"first_k_dense_replace": 1, "num_hidden_layers": 5}
OSS = {"model_type": "gpt_oss", "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4}
OSS |= {"intermediate_size": 12, "num_local_experts": 12, "num_experts_per_tok": 2, "sliding_window": 8}
OSS |= {"vocab_size": 90, "num_hidden_layers": 5}
HYBRID = {"model_type": "nemotron_h", "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 2}
HYBRID |= {"head_dim": 4, "vocab_size": 90, "hybrid_override_pattern": "M*-EM", "mamba_num_heads": 8}
HYBRID |= {"mamba_head_dim": 4, "n_groups": 2, "ssm_state_size": 4, "intermediate_size": 24, "n_routed_experts": 12}
HYBRID |= {"num_experts_per_tok": 2, "moe_intermediate_size": 10, "moe_shared_expert_intermediate_size": 20}
FUSED = {"model_type": "phi3", "hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 2}
FUSED |= {"intermediate_size": 50, "num_hidden_layers": 5, "vocab_size": 101}
GPT = {"model_type": "gpt2", "n_embd": 48, "n_head": 12, "n_layer": 5, "vocab_size": 101, "n_positions": 16}
CONFIGS: dict[str, dict[str, object]] = {
    "gqa": dict(GQA),
    "gqa-tied": GQA | {"tie_word_embeddings": True},
    "mla-moe": dict(MOE),
    "gpt-oss": dict(OSS),
    "nemotron-h": dict(HYBRID),
    "phi3": dict(FUSED),
    "gpt2": dict(GPT),
}


@cache
def model_of(name: str) -> ModelSpec:
    return ModelSpec.from_config(CONFIGS[name])


@dataclass(frozen=True)
class Rank:
    dp: int
    pp: int
    cp: int
    tp: int


@st.composite
def layouts(draw: st.DrawFn) -> HybridParallelConfig:
    sizes = {axis: draw(st.integers(1, 3)) for axis in ("dp", "cp")}
    tp, pp = draw(st.sampled_from([1, 2, 3, 4, 6])), draw(st.integers(1, 3))
    spread = sizes["dp"] * sizes["cp"] * tp
    ep = draw(st.sampled_from([n for n in (1, 2, 3, 4, 5, 6, 12) if spread % n == 0]))
    etp = draw(st.sampled_from([n for n in (1, 2, 3) if spread // ep % n == 0]))
    return HybridParallelConfig(
        dp=sizes["dp"], cp=sizes["cp"], tp=tp, pp=pp, ep=ep, expert_tp=etp, global_batch=sizes["dp"]
    )


def held_layers(model: ModelSpec, config: HybridParallelConfig, stage: int) -> list[tuple[int, int]]:
    edges = [model.num_layers * i // config.pp for i in range(config.pp + 1)]
    return [(edges[stage], edges[stage + 1])]


@settings(max_examples=80)
@given(st.sampled_from(sorted(CONFIGS)), layouts())
def test_counts_over_the_ranks_sum_to_the_model_with_replicas_counted_once(
    name: str, config: HybridParallelConfig
) -> None:
    model, total = model_of(name), 0
    for place in product(range(config.dp), range(config.pp), range(config.cp), range(config.tp)):
        rank, held = Rank(*place), held_layers(model, config, place[1])
        last = place[1] == config.pp - 1
        own = rank_parameters(model, config, rank, held, last=last, owned=True)
        assert own <= rank_parameters(model, config, rank, held, last=last)
        total += own
    assert total == model.parameters


@settings(max_examples=60)
@given(st.sampled_from(sorted(CONFIGS)), layouts())
def test_the_first_rank_of_a_stage_holds_what_the_array_form_says(name: str, config: HybridParallelConfig) -> None:
    model = model_of(name)
    for stage in range(config.pp):
        held, last = held_layers(model, config, stage), stage == config.pp - 1
        ranks = [
            rank_parameters(model, config, Rank(dp, stage, cp, tp), held, last=last)
            for dp, cp, tp in product(range(config.dp), range(config.cp), range(config.tp))
        ]
        expected = 0
        for k in model.pattern[held[0][0] : held[0][1]]:
            dense, expert = layer_parameters(model.kinds[k], config.tp, config.ep, config.expert_tp)
            expected += int(dense) + int(expert)
        ends = (model.embedding_tensors if stage == 0 else ()) + (
            model.final_tensors + (model.head_tensors if stage == 0 else model.output_tensors) if last else ()
        )
        expected += int(per_rank_elements(ends, config.tp)[0])
        assert ranks[0] == max(ranks) == expected


@given(st.sampled_from(sorted(CONFIGS)), st.integers(1, 5))
def test_stages_sum_to_the_model_and_a_tied_table_is_held_by_both_ends(name: str, pp: int) -> None:
    model = model_of(name)
    edges = [model.num_layers * i // pp for i in range(pp + 1)]
    stages = [stage_parameters(model, edges[i], edges[i + 1], first=i == 0, last=i == pp - 1) for i in range(pp)]
    copies = sum(t.size for t in model.tied_tensors) if pp > 1 else 0
    assert sum(stages) == model.parameters + copies


def test_layer_counts_take_arrays_of_sizes() -> None:
    kind = model_of("mla-moe").kinds[1]
    tp, ep, etp = np.array([1, 2, 4]), np.array([1, 3, 12]), np.array([1, 1, 2])
    dense, expert = layer_parameters(kind, tp, ep, etp)
    for i in range(3):
        one_dense, one_expert = layer_parameters(kind, int(tp[i]), int(ep[i]), int(etp[i]))
        assert (dense[i], expert[i]) == (one_dense, one_expert)
    whole = sum(t.size for t in kind.tensors)
    assert dense[0] + expert[0] == whole


def test_kv_heads_fewer_than_ranks_are_replicated_not_split_further() -> None:
    kind = load("llama-3.1-70b").kinds[0]  # 64 heads, 8 KV heads of 128, hidden 8192
    keys = [t for t in kind.tensors if t.name == "self_attn.k_proj.weight"]
    assert [int(per_rank_elements(keys, tp)[0]) for tp in (1, 8, 16, 64)] == [
        8 * 128 * 8192,
        128 * 8192,
        128 * 8192,
        128 * 8192,
    ]
    fused = [t for t in load("phi-3-medium").kinds[0].tensors if t.name == "self_attn.qkv_proj.weight"]
    # 40 heads and 10 KV heads of 128: at tp 20, 2 heads and one KV head (key and value).
    assert int(per_rank_elements(fused, 20)[0]) == (2 + 2) * 128 * 5120


def test_an_odd_vocabulary_gives_the_first_ranks_the_larger_chunk() -> None:
    model = model_of("gqa")  # 101 rows of 48
    table = model.embedding_tensors
    assert int(per_rank_elements(table, 4)[0]) == 26 * 48
    config = HybridParallelConfig(tp=4)
    rows = [rank_parameters(model, config, Rank(0, 0, 0, tp), [], last=False) // 48 for tp in range(4)]
    assert rows == [26, 26, 26, 23]


def test_layers_outside_the_model_are_an_input_error() -> None:
    with pytest.raises(InputError, match="not within the 5 layers"):
        stage_parameters(model_of("gqa"), 3, 9, first=False, last=True)
