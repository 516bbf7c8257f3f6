"""`serve` and `check-serving` from the command line: failures told in words, differences found, loads accounted for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from meshwright.commands.check_serving import compared_tokens
from meshwright.layout.config import HybridParallelConfig
from meshwright.plan import Plan, ServingWorkload
from meshwright.runtime.generation.reference import ReferenceAnswer, reference_answers

from .test_server import free_port, running

Run = Callable[..., Any]


def plan_of(folder: Path, name: str, **sizes: Any) -> Path:
    """A plan that serves a tiny Llama whose weights are in folder/name."""
    config = AutoConfig.for_model(
        "llama", vocab_size=90, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        num_hidden_layers=2, max_position_embeddings=64, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
    plan = Plan.from_parts(
        str(folder / name), HybridParallelConfig(**sizes), ServingWorkload(kind="serving", prompt=6, output=8)
    )
    plan.write(folder / "plan.yaml")
    return folder / "plan.yaml"


def test_a_start_that_fails_ends_with_cause_remedy_and_lines(meshwright: Run, tmp_path: Path):
    plan = plan_of(tmp_path, "too-big", tp=2)
    with running(tmp_path):  # writes the executable
        pass
    words = ("--vllm", tmp_path / "vllm", "--port", free_port(), "--out", tmp_path / "served")
    done = meshwright("serve", plan, *words)
    assert done.code == 1
    assert "exit code 1" in done.err
    assert "no room" in done.err
    assert "No available memory" in done.err
    assert "Traceback" not in done.err


def test_a_missing_vllm_and_a_server_that_is_not_there_are_one_line(meshwright: Run, tmp_path: Path):
    plan = plan_of(tmp_path, "model", tp=2)
    for done in (
        meshwright("serve", plan, "--vllm", "no-such-vllm", "--out", tmp_path / "a"),
        meshwright("check-serving", plan, "--out", tmp_path / "b"),
    ):
        assert done.code == 2
        assert len(done.err.strip().splitlines()) == 1


def test_wrong_tokens_are_found_and_the_load_is_still_accounted_for(meshwright: Run, tmp_path: Path):
    plan = plan_of(tmp_path, "model", tp=2)
    with running(tmp_path):  # answers with sums, not with what the model says
        words = ("--out", tmp_path / "out", "--weights", tmp_path / "model", "--tokens", 4, "--prompts", 2)
        done = meshwright("check-serving", plan, *words, "--requests", 24, "--clients", 8, "--rate", 200, "--json")
    assert done.code == 1
    found = json.loads(done.out)
    assert found["agrees"] is False
    assert found["ranks_agree"] is True
    assert not any(t["agrees"] for t in found["tokens"])
    assert all(t["gap_there"] > 0 for t in found["tokens"])
    assert set(found["load"]) == {"closed", "open"}
    assert all(load["accounted_for"] and load["asked"] == 24 for load in found["load"].values())


@pytest.mark.parametrize(
    ("served", "first", "gap"), [((1, 2, 3), None, None), ((1, 9, 3), 1, 0.2), ((1, 2), 2, 0.3), ((9, 2, 3), 0, 0.1)]
)
def test_the_first_difference_is_told_with_its_gap(served: tuple[int, ...], first: int | None, gap: float | None):
    found = compared_tokens(served, ReferenceAnswer((1, 2, 3), (0.1, 0.2, 0.3)))
    assert (found["first_difference"], found["gap_there"]) == (first, gap)
    assert found["agrees"] is (first is None)


def test_the_reference_is_greedy_and_its_gaps_are_those_of_the_logits(tmp_path: Path):
    plan_of(tmp_path, "model")
    (answer,) = reference_answers(tmp_path / "model", [[3, 4, 5]], 5)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens = [3, 4, 5]
    for token, gap in zip(answer.tokens, answer.gaps, strict=True):
        logits = model(torch.tensor([tokens])).logits[0, -1].detach()
        best = logits.topk(2)
        assert int(best.indices[0]) == token
        assert gap == pytest.approx(float(best.values[0] - best.values[1]), abs=1e-5)
        tokens.append(token)
