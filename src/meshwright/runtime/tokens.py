"""Text to tokens, once: files or folders become one flat file of token ids beside its description.

In: a path of text, and a tokenizer - bytes, or the tokenizer.json of a Hugging Face model. Out: the token file, written
whole or not at all; asked again for the same text, tokenizer and cache, it is found and not made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import InputError
from meshwright.files import write_text

TEXT_SUFFIXES = frozenset(
    {".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".csv", ".html", ".tex", ".toml", ".yaml", ".yml"}
    | {".c", ".h", ".cc", ".cpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".sh"}
)
BYTES = "bytes"
DOCUMENT_END = 256
"""Token between documents under the byte tokenizer, whose vocabulary is 257."""
CHUNK_BYTES = 1 << 22
LARGEST_TEXT_BYTES = 1 << 40
END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<eos>")
"""Tried in this order where a folder's tokenizer_config.json does not say which token ends a document."""

Encode = Callable[[Path], Iterator[NDArray[np.int64]]]


@dataclass(frozen=True)
class TokenFile:
    """What stands beside a token file: how it was made. `largest` is the largest token id, `dtype` numpy's name,
    `digest` the SHA-256 of the file: what a resumed run must find again."""

    tokens: int
    dtype: str
    largest: int
    digest: str
    tokenizer: str
    source: str


def prepare(path: Path, tokenizer: str, cache: Path) -> Path:
    """Tokenise the text of `path` into `cache` unless the same was done before; returns the token file."""
    files = text_files(path)
    encode, fingerprint, dtype = _encoder(tokenizer)
    target = cache / f"tokens-{_fingerprint(files, fingerprint)}.bin"
    if target.is_file() and description_path(target).is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    beside = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        count, largest, digest = _write_tokens(beside, files, encode, dtype)
        description = TokenFile(count, str(dtype), largest, digest, tokenizer, str(path))
        write_text(description_path(target), json.dumps(asdict(description)))
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    return target


def text_files(path: Path) -> list[Path]:
    """The text files of a path, sorted; a file named directly is taken whatever its suffix."""
    if path.is_file():
        files = [path]
    elif path.is_dir():
        # hidden folders and files are not text that anyone wrote to be read
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES and p.is_file())
        files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts)]
    else:
        raise InputError(f"--data {path}: no such file or folder")
    if not files:
        some = ", ".join(sorted(TEXT_SUFFIXES)[:8])
        raise InputError(f"--data {path}: no text files in this folder (suffixes like {some}); name a file directly")
    size = sum(f.stat().st_size for f in files)
    if size == 0:
        raise InputError(f"--data {path}: empty")
    if size > LARGEST_TEXT_BYTES:
        raise InputError(f"--data {path}: more than {LARGEST_TEXT_BYTES >> 40} TiB of text; give a part of it")
    return files


def read_description(token_file: Path) -> TokenFile:
    """The checked description of a token file."""
    try:
        description = TokenFile(**json.loads(description_path(token_file).read_text("utf-8")))
        width = np.dtype(description.dtype).itemsize
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{token_file}: its description cannot be read ({str(error)[:100]})") from None
    numbers = (description.tokens, description.largest)
    if any(type(n) is not int or n < 0 for n in numbers) or description.dtype not in ("uint16", "uint32"):
        raise InputError(f"{token_file}: its description has counts or a dtype that cannot be")
    size = token_file.stat().st_size if token_file.is_file() else -1
    if size != description.tokens * width:
        raise InputError(f"{token_file}: has {size} bytes, not {description.tokens * width}; delete it to make it anew")
    return description


def description_path(token_file: Path) -> Path:
    return token_file.with_suffix(".json")


def _write_tokens(target: Path, files: Sequence[Path], encode: Encode, dtype: np.dtype[Any]) -> tuple[int, int, str]:
    """Returns how many tokens were written, the largest, and the digest of all."""
    count, largest, digest = 0, 0, hashlib.sha256()
    with target.open("wb") as out:
        for file in files:
            for tokens in encode(file):
                written = tokens.astype(dtype).tobytes()
                out.write(written)
                digest.update(written)
                count += len(tokens)
                largest = max(largest, int(tokens.max(initial=0)))
        out.flush()
        os.fsync(out.fileno())
    return count, largest, digest.hexdigest()


def _fingerprint(files: Sequence[Path], tokenizer: str) -> str:
    """Changes whenever a file, its size or time, or the tokenizer does."""
    digest = hashlib.sha256(tokenizer.encode())
    for file in files:
        status = file.stat()
        digest.update(f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _encoder(tokenizer: str) -> tuple[Encode, str, np.dtype[Any]]:
    """How a file becomes tokens, what identifies the tokenizer, and the narrowest type for its ids."""
    if tokenizer == BYTES:
        return _encode_bytes, BYTES, np.dtype(np.uint16)
    file = Path(tokenizer) / "tokenizer.json" if Path(tokenizer).is_dir() else Path(tokenizer)
    if not file.is_file():
        raise InputError(f"--tokenizer {tokenizer}: no such tokenizer.json; use '{BYTES}' or the path of one")
    from tokenizers import Tokenizer  # only jobs that use it pay for the import

    try:
        loaded = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"--tokenizer {tokenizer}: not a tokenizer.json ({str(error)[:100]})") from None
    end = _end_token(loaded, file.with_name("tokenizer_config.json"))

    def encode(text_file: Path) -> Iterator[NDArray[np.int64]]:
        text = text_file.read_text(encoding="utf-8", errors="replace")
        yield np.array([*loaded.encode(text, add_special_tokens=False).ids, *end], dtype=np.int64)

    wide = max(loaded.get_vocab().values(), default=0) > np.iinfo(np.uint16).max  # ids may have gaps
    content = hashlib.sha256(file.read_bytes()).hexdigest()
    return encode, content, np.dtype(np.uint32 if wide else np.uint16)


def _encode_bytes(file: Path) -> Iterator[NDArray[np.int64]]:
    with file.open("rb") as source:
        while chunk := source.read(CHUNK_BYTES):
            yield np.frombuffer(chunk, dtype=np.uint8).astype(np.int64)
    yield np.array([DOCUMENT_END])


def _end_token(tokenizer: Any, config: Path) -> list[int]:
    """The id of the token that ends a document, or nothing where the tokenizer has none."""
    candidates: list[Any] = []
    if config.is_file():
        try:
            eos = json.loads(config.read_text("utf-8")).get("eos_token")
        except (ValueError, AttributeError, RecursionError):
            raise InputError(f"{config}: not the JSON of a tokenizer's settings") from None
        candidates.append(eos.get("content") if isinstance(eos, dict) else eos)
    for token in (*candidates, *END_TOKENS):
        number = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if number is not None:
            return [int(number)]
    return []
