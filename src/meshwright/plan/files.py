"""Writing files that are whole or not there: beside, flushed to disk, renamed. In: a path and text."""

from __future__ import annotations

import os
from pathlib import Path

from meshwright.errors import InputError


def write_text(target: Path, text: str) -> None:
    """Write the file whole or not at all."""
    if not target.name or target.is_dir():
        raise InputError(f"{target}: is a folder; give the name of a file, like plan.yaml")
    if target.exists() and not target.is_file():  # renaming over it would replace the device itself
        raise InputError(f"{target}: is a device or pipe; give the name of a file, like plan.yaml")
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from None
