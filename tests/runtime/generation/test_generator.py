"""Tokens of every layout against transformers' own generate, in float32, and draws that no layout changes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig, Precision
from meshwright.runtime.generation.generator import GenerationJob, generate_forked
from meshwright.runtime.generation.pipeline import Batch, GenerationPipeline
from meshwright.runtime.generation.sampler import Sampling
from meshwright.runtime.weights import reference_model

from ..tiny import tiny

PROMPTS = ((5, 9, 17), (40, 41, 42, 43, 44, 45, 46), (77,), (3, 3, 60, 8, 21), (90, 2, 13, 55), (8, 7, 6, 5, 4, 3))
NEW = 12
SEED = 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "tp2-pp2-dp2": {"tp": 2, "pp": 2, "dp": 2},
}


def config_of(family: str) -> Any:
    return tiny(family, initializer_range=0.3)


def job(family: str, layout: dict[str, Any], **changes: Any) -> GenerationJob:
    parallel = HybridParallelConfig(precision=Precision.FP32, **layout)
    values: dict[str, Any] = {"prompts": PROMPTS, "new_tokens": NEW, "weights_seed": SEED, "show_progress": False}
    return GenerationJob(parallel, config_of(family), **(values | changes))


@cache
def transformers_tokens(family: str, ends: tuple[int, ...] = ()) -> tuple[tuple[int, ...], ...]:
    """What one process of plain transformers answers, prompt by prompt."""
    model: Any = reference_model(config_of(family), SEED, torch.float32).eval()
    found: list[tuple[int, ...]] = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, use_cache=True,
            eos_token_id=list(ends) or None, pad_token_id=0,
        )  # fmt: skip
        found.append(tuple(int(t) for t in out[0, len(prompt) :]))
    return tuple(found)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_tokens_are_those_of_transformers(family: str, layout: str):
    done = generate_forked(job(family, LAYOUTS[layout]))
    assert done.tokens == transformers_tokens(family)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "phi3", "gpt2", "gpt_neox", "qwen2"])
def test_other_families_agree_with_windows_and_learned_positions(family: str):
    done = generate_forked(job(family, LAYOUTS["tp2-pp2"]))
    assert done.tokens == transformers_tokens(family)


@pytest.mark.parametrize(
    "layout",
    [
        {"pp": 2},
        {"tp": 2, "ep": 2},
        {"tp": 2, "pp": 2, "ep": 2},
        {"tp": 2, "pp": 2, "dp": 2, "ep": 2},
        {"tp": 2, "expert_tp": 2},
    ],
)
def test_mixtral_agrees_with_its_experts_spread_or_cut(layout: dict[str, Any]):
    done = generate_forked(job("mixtral", layout))
    assert done.tokens == transformers_tokens("mixtral")


def test_fewer_kv_heads_than_ranks_share_a_head():
    done = generate_forked(job("llama", {"tp": 4}))
    assert done.tokens == transformers_tokens("llama")


def test_batches_of_one_and_more_batches_than_stages_change_nothing():
    done = generate_forked(job("llama", LAYOUTS["pp2"], batch=1))
    assert done.tokens == transformers_tokens("llama")


class RecordedPipeline(GenerationPipeline):
    """What a stage does in which order, without a stage."""

    def _turn(self, batch: Batch) -> None:
        EVENTS.append(("works on", batch.numbers[0]))

    def _note(self, batch: Batch) -> None:
        EVENTS.append(("waits for", batch.numbers[0]))
        batch.steps += 1


EVENTS: list[tuple[str, int]] = []


def test_a_stage_works_on_every_other_batch_before_it_waits_for_one():
    """So that with a batch per stage no stage idles: a batch's tokens come while the others are worked on."""
    EVENTS.clear()
    nothing: Any = None
    run = RecordedPipeline(nothing, nothing, nothing, nothing, Sampling(), 3, frozenset(), torch.float32,
                           torch.device("cpu"), lambda _: None)  # fmt: skip
    run.run([Batch.of((n,), [[1]], 3, torch.device("cpu")) for n in range(5)], in_flight=2)
    flying: list[int] = []
    most = 0
    for at, (what, number) in enumerate(EVENTS):
        if what == "works on":
            flying.append(number)
            most = max(most, len(flying))
            continue
        last = max(i for i in range(at) if EVENTS[i] == ("works on", number))
        between = {n for kind, n in EVENTS[last + 1 : at] if kind == "works on"}
        assert between >= set(flying) - {number}
        flying.remove(number)
    assert most == 2
    assert flying == []
    assert EVENTS.count(("waits for", 4)) == 3


def test_answers_end_at_the_end_token_as_in_transformers():
    plain = transformers_tokens("llama")
    ends = (plain[0][2], plain[4][5])
    expected = transformers_tokens("llama", ends)
    assert any(len(answer) < NEW for answer in expected)
    done = generate_forked(job("llama", LAYOUTS["tp2-pp2"], ends=frozenset(ends), batch=2))
    assert done.tokens == expected


def test_draws_do_not_depend_on_the_layout_but_on_the_seed():
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=11)
    alone = generate_forked(job("qwen3", {}, sampling=sampling)).tokens
    assert alone != transformers_tokens("qwen3")
    for layout in ("tp2-pp2", "tp2-pp2-dp2"):
        assert generate_forked(job("qwen3", LAYOUTS[layout], sampling=sampling, batch=2)).tokens == alone
    other = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=12)
    assert generate_forked(job("qwen3", {}, sampling=other)).tokens != alone


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": ((),)}, "prompt 1 is empty"),
        ({"prompts": ((96,),)}, "the vocabulary ends at 95"),
        ({"new_tokens": 90}, "64 positions"),
    ],
)
def test_prompts_that_cannot_be_are_refused_before_ranks_start(changes: dict[str, Any], words: str):
    with pytest.raises(InputError, match=words):
        generate_forked(job("llama", {}, **changes))


def test_sequences_and_experts_over_replicas_are_refused():
    with pytest.raises(InputError, match="cp=2"):
        generate_forked(job("llama", {"cp": 2}))
    with pytest.raises(InputError, match="over replicas"):
        generate_forked(job("llama", {"dp": 2, "ep": 2}))
