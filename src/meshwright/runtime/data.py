"""Training data from text files: tokenised once into a flat file, memory-mapped, read in a fixed order by any layout.

In: a file or folder of text, and a tokenizer (bytes, or a tokenizer.json of Hugging Face). Out: `TokenData.batch(i, n)`,
the i-th to (i+n)-th sequences of the run: windows of seq + 1 tokens, shuffled per epoch by a seed. The order does not
depend on the layout, so the position is one number: the sequences consumed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meshwright.errors import InputError

TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".json", ".csv", ".html", ".tex", ".c", ".h", ".cpp", ".rs"})
BYTES = "bytes"
DOCUMENT_END = 256
"""Token between documents under the byte tokenizer, whose vocabulary is 257."""
CHUNK_BYTES = 1 << 22
LARGEST_TEXT_BYTES = 1 << 36


@dataclass(frozen=True)
class TokenFile:
    """What stands beside a token file: how it was made. `largest` is the largest token id."""

    tokens: int
    dtype: str
    largest: int
    tokenizer: str
    source: str


def text_files(path: Path) -> list[Path]:
    """The text files of a path, sorted; a file named directly is taken whatever its suffix."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"--data {path}: no such file or folder")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES and p.is_file())
    if not files:
        raise InputError(
            f"--data {path}: no text files in this folder (known suffixes: {', '.join(sorted(TEXT_SUFFIXES))})"
        )
    return files


def prepare(path: Path, tokenizer: str, cache: Path) -> Path:
    """Tokenise the text of `path` into `cache` unless the same was done before; returns the token file."""
    files = text_files(path)
    if sum(f.stat().st_size for f in files) > LARGEST_TEXT_BYTES:
        raise InputError(f"--data {path}: more than {LARGEST_TEXT_BYTES >> 30} GiB of text; give a part of it")
    target = cache / f"tokens-{_fingerprint(files, tokenizer)}.bin"
    if target.is_file() and _description_path(target).is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if tokenizer == BYTES else np.uint32)
    beside = target.with_suffix(f".{os.getpid()}.tmp")
    count, largest = 0, 0
    with beside.open("wb") as out:
        for tokens in _tokenised(files, tokenizer):
            out.write(tokens.astype(dtype).tobytes())
            count += len(tokens)
            largest = max(largest, int(tokens.max(initial=0)))
        out.flush()
        os.fsync(out.fileno())
    description = TokenFile(count, str(dtype), largest, tokenizer, str(path))
    write_text(_description_path(target), json.dumps(asdict(description)))
    beside.replace(target)
    return target


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _description_path(token_file: Path) -> Path:
    return token_file.with_suffix(".json")


def _fingerprint(files: list[Path], tokenizer: str) -> str:
    """Changes whenever a file, its size or time, or the tokenizer does."""
    digest = hashlib.sha256(tokenizer.encode())
    for file in [*files, *([] if tokenizer == BYTES else [Path(tokenizer)])]:
        status = file.stat()
        digest.update(f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _tokenised(files: list[Path], tokenizer: str) -> Iterator[NDArray[np.int64]]:
    """Tokens of each document, followed by the end-of-document token."""
    if tokenizer == BYTES:
        for file in files:
            with file.open("rb") as source:
                while chunk := source.read(CHUNK_BYTES):
                    yield np.frombuffer(chunk, dtype=np.uint8).astype(np.int64)
            yield np.array([DOCUMENT_END])
        return
    encoder = _load_tokenizer(tokenizer)
    ends = [i for i in (encoder.token_to_id(t) for t in ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")) if i]
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        ids = encoder.encode(text, add_special_tokens=False).ids
        yield np.array([*ids, *ends[:1]], dtype=np.int64)


def _load_tokenizer(path: str):
    from tokenizers import Tokenizer

    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(f"--tokenizer {path}: no such tokenizer.json; use '{BYTES}' or the path of one")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        raise InputError(f"--tokenizer {path}: not a tokenizer.json ({str(error)[:100]})") from error


class TokenData:
    """Sequences of a token file, in the order of a seeded shuffle per epoch."""

    def __init__(self, token_file: Path, seq: int, seed: int, vocab: int) -> None:
        try:
            description = TokenFile(**json.loads(_description_path(token_file).read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{token_file}: its description cannot be read ({error})") from None
        if description.largest >= vocab:
            raise InputError(
                f"the data has token {description.largest}, but the model's vocabulary is {vocab}; "
                f"use the model's own tokenizer, or a vocabulary of at least {description.largest + 1}"
            )
        self.seq = seq
        self.seed = seed
        self.sequences = (description.tokens - 1) // seq
        if self.sequences < 1:
            raise InputError(f"the data has {description.tokens} tokens: too few for one sequence of {seq}")
        self._tokens = np.memmap(token_file, dtype=description.dtype, mode="r", shape=(description.tokens,))
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Token ids and labels [count, seq] of the run's sequences first .. first + count - 1."""
        windows = np.stack([self._window(index) for index in range(first, first + count)])
        both = torch.from_numpy(windows)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    def _window(self, index: int) -> NDArray[np.int64]:
        epoch, position = divmod(index, self.sequences)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.sequences)
        start = int(self._order[position]) * self.seq
        return self._tokens[start : start + self.seq + 1].astype(np.int64)
