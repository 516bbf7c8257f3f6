"""Prompts as token ids and answers as text: bytes, or the tokenizer.json of a Hugging Face model.

In: the name of a tokenizer ('bytes', or a path). Out: a `TextCodec`. `byte_tokenizer_json` writes the byte tokenizer as
such a file, so that vLLM reads what a model that was trained on bytes expects.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meshwright.errors import InputError
from meshwright.runtime.tokens import BYTES, DOCUMENT_END

END_OF_TEXT = "<|endoftext|>"


class TextCodec:
    """Encode and decode. `loaded`: a tokenizers.Tokenizer, or None for bytes."""

    def __init__(self, loaded: Any | None) -> None:
        self._loaded = loaded

    def encode(self, text: str) -> tuple[int, ...]:
        if self._loaded is None:
            return tuple(text.encode())
        return tuple(int(i) for i in self._loaded.encode(text).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        if self._loaded is None:
            return bytes(t for t in tokens if t < DOCUMENT_END).decode(errors="replace")
        return str(self._loaded.decode(list(tokens)))

    @property
    def is_bytes(self) -> bool:
        return self._loaded is None


def codec(tokenizer: str) -> TextCodec:
    """The codec of 'bytes' or a tokenizer.json (or its folder)."""
    if tokenizer == BYTES:
        return TextCodec(None)
    path = Path(tokenizer)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"--tokenizer {tokenizer}: no such tokenizer.json; use '{BYTES}' or the path of one")
    from tokenizers import Tokenizer  # only jobs that use it pay for the import

    try:
        return TextCodec(Tokenizer.from_file(str(file)))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"--tokenizer {tokenizer}: not a tokenizer.json ({str(error)[:100]})") from None


def byte_tokenizer_json() -> str:
    """A tokenizer.json whose ids are the bytes themselves, with the end of a document after them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's byte alphabet
    others = [b for b in range(256) if b not in printable]
    names = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    vocabulary = {names[b]: b for b in range(256)} | {END_OF_TEXT: DOCUMENT_END}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end = {"id": DOCUMENT_END, "content": END_OF_TEXT, "special": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [end | plain], "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                  "byte_fallback": False, "ignore_merges": False},
    })  # fmt: skip


def write_byte_tokenizer(folder: Path) -> None:
    """The byte tokenizer beside exported weights, as transformers and vLLM look for it."""
    (folder / "tokenizer.json").write_text(byte_tokenizer_json(), "utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
