"""Rules against a model and a cluster: words for one config, a mask for many, from one table."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.layout import (
    ClusterFacts,
    ContextVariant,
    HybridParallelConfig,
    ModelFacts,
    Schedule,
    legal_mask,
    validate,
    violations,
)

LLAMA = ModelFacts(heads=32, kv_heads=8, layers=32, hidden=4096, mlp_width=14336, vocab=128256, experts=0, seq=8192)
MOE = ModelFacts(heads=32, kv_heads=4, layers=48, hidden=2048, experts=128, expert_width=768, seq=4096)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tp": 3}, "^tp=3 does not divide 32 attention heads; try 2 or 4$"),
        ({"tp": 64}, "tp=64 does not divide 32 attention heads; try 32"),
        ({"pp": 33}, "pp=33 has more stages than the model has layers .32.; use pp of at most 32"),
        ({"pp": 16, "vpp": 3, "schedule": "interleaved-1f1b", "global_batch": 16}, "48 chunks, .* at most 10"),
        ({"dp": 2, "ep": 2}, "the model has no experts"),
        ({"cp": 3}, "cp=3 needs a sequence that divides by 2 x cp = 6; 8192 does not; try 2 or 4"),
        (
            {"cp": 16, "tp": 4, "cp_variant": "all_to_all"},
            "^cp=16 with cp_variant all_to_all does not divide the 8 attention heads that tp=4 leaves a rank; "
            "try 8, or cp_variant ring$",
        ),
        ({"pp": 2, "layer_split": (16, 15)}, "layer_split sums to 31 layers, but the model has 32"),
    ],
)
def test_configs_that_do_not_suit_the_model_are_refused(fields: dict[str, object], words: str):
    with pytest.raises(InputError, match=words) as error:
        validate(HybridParallelConfig(**fields), LLAMA)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("facts", "fields", "words"),
    [
        (MOE, {"dp": 96, "ep": 96}, "ep=96 does not divide 128 experts; try 64 or 128"),
        (MOE, {"tp": 9, "expert_tp": 9}, "tp=9 does not divide 32"),
        (ModelFacts(experts=8, expert_width=768), {"dp": 5, "expert_tp": 5}, "5 does not divide 768 expert columns"),
        (ModelFacts(heads=12, kv_heads=4), {"tp": 6}, "tp=6 neither divides nor is a multiple of 4 key-value heads"),
        (
            ModelFacts(heads=24, kv_heads=12),
            {"cp": 4, "tp": 2, "cp_variant": "all_to_all"},
            "cp=4 with cp_variant all_to_all neither divides nor is a multiple of the 6 key-value heads that tp=2 "
            "leaves a rank; try 3 or 6, or cp_variant ring",
        ),
        (ModelFacts(mlp_width=100), {"tp": 8}, "tp=8 does not divide 100 MLP columns; try 5 or 10"),
        (
            ModelFacts(seq=1026),
            {"tp": 4, "sequence_parallel": True},
            "the 1026 tokens of a rank over tp=4, .* try 3 or 6, or leave sequence parallel out",
        ),
    ],
)
def test_rules_name_what_they_ask_of_the_model(facts: ModelFacts, fields: dict[str, object], words: str):
    with pytest.raises(InputError, match=words):
        validate(HybridParallelConfig(**fields), facts)


def test_rules_hold_at_their_edges_and_break_one_step_beyond():
    """Configs that a rule just allows, each with its nearest neighbour that the rule forbids."""
    interleaved = {"pp": 4, "vpp": 2, "schedule": "interleaved-1f1b", "dp": 3}
    exchanged = {"cp_variant": "all_to_all"}
    for facts, allowed, forbidden in (
        (LLAMA, {"pp": 32}, {"pp": 33}),
        (LLAMA, interleaved | {"pp": 16, "global_batch": 48}, interleaved | {"pp": 32, "global_batch": 96}),
        (ModelFacts(seq=24), {"cp": 4}, {"cp": 8}),
        (
            ModelFacts(seq=24),
            {"cp": 3, "tp": 8, "sequence_parallel": True},
            {"cp": 3, "tp": 3, "sequence_parallel": True},
        ),
        (MOE, {"dp": 128, "ep": 128}, {"dp": 256, "ep": 256}),
        (LLAMA, {"cp": 16} | exchanged, {"cp": 16, "tp": 4} | exchanged),
        (LLAMA, {"cp": 64}, {"cp": 64} | exchanged),
        (ModelFacts(heads=24, kv_heads=6), {"cp": 12} | exchanged, {"cp": 4} | exchanged),
    ):
        validate(HybridParallelConfig(**allowed), facts)
        with pytest.raises(InputError):
            validate(HybridParallelConfig(**forbidden), facts)


def test_key_value_heads_may_be_fewer_than_tp():
    validate(HybridParallelConfig(tp=32), LLAMA)
    validate(HybridParallelConfig(tp=4), LLAMA)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dp": 4, "tp": 8}, "dp=4 x pp=1 x cp=1 x tp=8 = 32 ranks, but there are 64 GPUs; dp=8 fills them"),
        ({"tp": 7}, "64 divides into tp 1, 2, 4, 8"),
        ({"pp": 3, "tp": 8}, "pp x cp must divide 64; try 2 or 4"),
    ],
)
def test_a_world_that_is_not_the_cluster_is_refused_with_a_way_to_fill_it(fields: dict[str, object], words: str):
    with pytest.raises(InputError, match=words):
        validate(HybridParallelConfig(**fields), None, ClusterFacts(gpus=64))


def test_facts_that_are_not_known_are_not_checked():
    validate(HybridParallelConfig(tp=7, pp=9, cp=5))


def test_all_broken_rules_can_be_listed():
    found = violations(HybridParallelConfig(tp=3, cp=5), LLAMA, ClusterFacts(gpus=64))
    about = ("attention heads", "key-value heads", "MLP columns", "sequence", "GPUs")
    assert len(found) == len(about)
    assert all(word in message for word, message in zip(about, found, strict=True))


def test_spelled_out_layer_split_may_leave_a_chunk_empty():
    validate(HybridParallelConfig(pp=3, layer_split=(1, 1, 0)), ModelFacts(layers=2))


size = st.sampled_from([1, 2, 3, 4, 6, 8, 16, 64])


@given(
    st.lists(
        st.tuples(*[size] * 9, st.booleans(), st.sampled_from(list(Schedule)), st.sampled_from(list(ContextVariant))),
        min_size=1,
        max_size=20,
    ),
    st.sampled_from([LLAMA, MOE, ModelFacts()]),
)
@settings(max_examples=200)
def test_mask_of_many_says_what_construction_and_validation_of_each_say(rows: list[tuple], facts: ModelFacts):
    names = ("dp", "tp", "pp", "cp", "ep", "expert_tp", "vpp", "micro_batch", "global_batch")
    columns = {name: np.array([row[i] for row in rows], dtype=np.int64) for i, name in enumerate(names)}
    cluster = ClusterFacts(gpus=64)
    found = legal_mask(
        facts,
        cluster,
        **columns,
        sequence_parallel=np.array([row[9] for row in rows]),
        schedule=np.array([list(Schedule).index(row[10]) for row in rows]),
        heads_exchanged=np.array([row[11] is ContextVariant.ALL_TO_ALL for row in rows]),
    )

    def legal(row: tuple) -> bool:
        try:
            config = HybridParallelConfig(
                **dict(zip(names, row[:9], strict=True)),
                sequence_parallel=row[9],
                schedule=row[10],
                cp_variant=row[11],
            )
            validate(config, facts, cluster)
        except InputError:
            return False
        return True

    assert found.tolist() == [legal(row) for row in rows]


def test_a_million_rows_are_judged_in_a_second():
    count = 1_000_000
    one = np.ones(count, dtype=np.int64)
    found = legal_mask(
        LLAMA,
        ClusterFacts(gpus=64),
        dp=one * 8,
        tp=one * 8,
        pp=one,
        cp=one,
        ep=one,
        expert_tp=one,
        vpp=one,
        micro_batch=one,
        global_batch=one * 512,
        sequence_parallel=np.ones(count, dtype=np.bool_),
        schedule=one,
    )
    assert found.all()
