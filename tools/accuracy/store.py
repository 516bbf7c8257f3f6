"""Results that take minutes are kept under build/accuracy, under a key of everything they were made from.

In: a name, the files and words that the result depends on, the work. Out: the result, as JSON has it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/accuracy"
SAYS_NOTHING_OF_PREDICTIONS = ("spread.toml", "confidence.py")


def kept(name: str, files: Iterable[Path], words: Iterable[str], work: Callable[[], Any]) -> Any:
    """What `work` gives, from the store where nothing that it depends on has changed since."""
    digest = hashlib.sha256()
    for part in (*(path.read_bytes() for path in sorted(files)), *(word.encode() for word in words)):
        digest.update(len(part).to_bytes(8, "little") + part)
    path = BUILD / f"{name}-{digest.hexdigest()[:16]}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    result = work()
    replace_text(path, json.dumps(result))
    return json.loads(path.read_text(encoding="utf-8"))


def replace_text(path: Path, text: str) -> None:
    """Write beside, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(path.suffix + ".new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def sources(*folders: str) -> list[Path]:
    """Code and data files of some folders of the project, but not the spread that is made from the results."""
    found = [p for f in folders for kind in ("*.py", "*.toml") for p in (ROOT / f).rglob(kind)]
    return [p for p in found if p.name not in SAYS_NOTHING_OF_PREDICTIONS]
