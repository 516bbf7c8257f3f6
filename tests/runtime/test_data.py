"""Text becomes tokens once; sequences come in one order whatever the layout; hostile input is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from meshwright.errors import InputError
from meshwright.runtime.data import TokenData
from meshwright.runtime.tokens import DOCUMENT_END, description_path, prepare, read_description

VOCABULARY = 257


def tokens_of(file: Path) -> list[int]:
    return np.fromfile(file, dtype=read_description(file).dtype).tolist()


def test_bytes_of_all_files_in_order_with_a_token_after_each(tmp_path: Path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "b.txt").write_bytes(b"\xff\x00b")
    (tmp_path / "text" / "a.md").write_text("aé")
    (tmp_path / "text" / "picture.png").write_bytes(b"not text")
    file = prepare(tmp_path / "text", "bytes", tmp_path)
    assert tokens_of(file) == [*"aé".encode(), DOCUMENT_END, 255, 0, ord("b"), DOCUMENT_END]
    assert read_description(file).largest == DOCUMENT_END


def test_text_is_tokenised_once_until_it_changes(tmp_path: Path):
    text = tmp_path / "a.txt"
    text.write_text("one text")
    first = prepare(text, "bytes", tmp_path / "cache")
    made = first.stat().st_mtime_ns
    assert prepare(text, "bytes", tmp_path / "cache") == first
    assert first.stat().st_mtime_ns == made
    text.write_text("another text")
    assert prepare(text, "bytes", tmp_path / "cache") != first


def test_a_hugging_face_tokenizer_is_used_and_ends_documents_with_its_own_token(tmp_path: Path):
    vocabulary = {"one": 0, "two": 1, "[UNK]": 2, "<stop>": 70_000}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    (tmp_path / "a.txt").write_text("two one three")
    assert tokens_of(prepare(tmp_path / "a.txt", str(tmp_path), tmp_path)) == [1, 0, 2, 70_000]


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_bytes(bytes(range(256)) * 3)
    return prepare(folder / "a.txt", "bytes", folder)


@settings(max_examples=40)
@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 9), st.integers(0, 5))
def test_the_shards_of_any_dp_are_the_global_batch_in_order(token_file: Path, dp: int, step: int, seed: int):
    batch, share = 12, 12 // dp
    whole, labels = TokenData(token_file, 7, seed, VOCABULARY).batch(step * batch, batch)
    shards = [TokenData(token_file, 7, seed, VOCABULARY).batch(step * batch + r * share, share) for r in range(dp)]
    assert torch.equal(whole, torch.cat([tokens for tokens, _ in shards]))
    assert torch.equal(labels, torch.cat([shifted for _, shifted in shards]))
    assert torch.equal(whole[:, 1:], labels[:, :-1])


def test_every_epoch_reads_every_sequence_once_in_another_order(token_file: Path):
    data = TokenData(token_file, 16, 0, VOCABULARY)
    first, second = data.batch(0, data.sequences)[0], data.batch(data.sequences, data.sequences)[0]
    assert data.sequences == 48
    assert not torch.equal(first, second)
    assert sorted(first.tolist()) == sorted(second.tolist())


def test_another_seed_is_another_order(token_file: Path):
    one, other = (TokenData(token_file, 16, seed, VOCABULARY).batch(0, 20)[0] for seed in (1, 2))
    assert not torch.equal(one, other)


def test_text_that_is_not_there_or_empty_or_too_short_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no such file"):
        prepare(tmp_path / "nowhere", "bytes", tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InputError, match="empty"):
        prepare(tmp_path / "empty.txt", "bytes", tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"1")
    with pytest.raises(InputError, match="no text files"):
        prepare(tmp_path / "pictures", "bytes", tmp_path)
    (tmp_path / "short.txt").write_text("123")
    with pytest.raises(InputError, match="too few"):
        TokenData(prepare(tmp_path / "short.txt", "bytes", tmp_path), 16, 0, VOCABULARY)


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '{"model": 3}', "\x00\x01"])
def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path, content: str):
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match="tokenizer"):
        prepare(tmp_path / "a.txt", str(tmp_path), tmp_path)
    with pytest.raises(InputError, match=r"no such tokenizer\.json"):
        prepare(tmp_path / "a.txt", "gpt2", tmp_path)


def test_a_vocabulary_smaller_than_the_largest_token_is_refused(token_file: Path):
    with pytest.raises(InputError, match="at least 257"):
        TokenData(token_file, 16, 0, 256)


@pytest.mark.parametrize(
    "change",
    [{"tokens": True}, {"tokens": -1}, {"tokens": 10**9}, {"dtype": "object"}, {"largest": 1.5}, {"surprise": 1}],
)
def test_a_damaged_description_is_refused(tmp_path: Path, change: dict[str, object]):
    (tmp_path / "a.txt").write_text("some text")
    file = prepare(tmp_path / "a.txt", "bytes", tmp_path)
    description = description_path(file)
    description.write_text(json.dumps(json.loads(description.read_text()) | change))
    with pytest.raises(InputError):
        TokenData(file, 2, 0, VOCABULARY)


def test_a_token_file_cut_short_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("some text")
    file = prepare(tmp_path / "a.txt", "bytes", tmp_path)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(InputError, match="delete it"):
        TokenData(file, 2, 0, VOCABULARY)
