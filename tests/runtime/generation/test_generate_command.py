"""`meshwright generate`: a trained checkpoint at another layout answers as its export does; bad input is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from meshwright.runtime.generation.text import codec, write_byte_tokenizer

from ..jobs import plan, text
from ..tiny import tiny

Run = Callable[..., Any]


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    text(tmp_path)
    document = plan(tiny(vocab=264), 3, tp=2, pp=2)
    document.write(tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml"


def test_a_trained_checkpoint_answers_as_its_export_does(meshwright: Run, plan_file: Path, tmp_path: Path):
    done = meshwright("train", plan_file, "--data", tmp_path / "text.txt", "--out", tmp_path / "run", "--export")
    assert done.code == 0, done.err
    values = yaml.safe_load(plan_file.read_text())
    values["parallel"] |= {"tp": 1, "dp": 2}
    values["workload"] = {"kind": "serving", "prompt": 8, "output": 8}
    plan_file.write_text(yaml.safe_dump(values))
    words = ("--prompt", "shard ", "--prompt", "mesh and rank", "--max-new-tokens", 10, "--json")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    found = [
        json.loads(meshwright("generate", plan_file, *source, *words).out)["answers"]
        for source in (("--checkpoint", checkpoint), ("--weights", tmp_path / "run" / "model"))
    ]
    assert found[0] == found[1]
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    for answer in found[0]:
        ids = torch.tensor([answer["prompt_tokens"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False,
                             eos_token_id=256, pad_token_id=0)  # fmt: skip
        assert out[0, ids.shape[1] :].tolist() == answer["tokens"]


def test_prompts_come_from_files_as_text_or_tokens(meshwright: Run, plan_file: Path, tmp_path: Path):
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"tokens": [116, 119, 111]}\n')
    answers = [
        json.loads(
            meshwright("generate", plan_file, "--prompts", tmp_path / name, "--random-weights", "--max-new-tokens", 3,
                       "--json").out
        )["answers"]
        for name in ("p.txt", "p.jsonl")
    ]  # fmt: skip
    assert answers[0] == answers[1]
    assert [a["prompt_tokens"] for a in answers[0]] == [list(b"one"), list(b"two")]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("--random-weights",), "no prompt"),
        (("--prompt", "a"), "--weights FOLDER"),
        (("--prompt", "a", "--random-weights", "--weights", "x"), "give one"),
        (("--prompt", "a", "--random-weights", "--top-p", "0"), "top-p"),
        (("--prompt", "a", "--random-weights", "--tokenizer", "nowhere"), "--tokenizer nowhere"),
        (("--prompt", "a", "--max-new-tokens", "4", "--checkpoint", "nowhere"), "not a checkpoint"),
    ],
)
def test_bad_input_is_one_line(meshwright: Run, plan_file: Path, words: tuple[str, ...], hint: str):
    done = meshwright("generate", plan_file, *words)
    assert done.code == 2
    assert hint in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_the_byte_tokenizer_as_a_file_is_bytes(tmp_path: Path):
    write_byte_tokenizer(tmp_path)
    words = "Grüße, 東京\n\tend \x00\x7f"
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(words)["input_ids"] == list(words.encode())
    assert theirs.eos_token_id == 256
    for one in (codec("bytes"), codec(str(tmp_path))):
        assert one.encode(words) == tuple(words.encode())
        assert one.decode([*words.encode(), 256]) == words
