"""Writing files that are whole or not there: beside, flushed to disk, renamed. In: a path and text."""

from __future__ import annotations

import os
from pathlib import Path

from meshwright.errors import InputError


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_named(target: Path, text: str, example: str) -> None:
    """The same for a file that somebody named on the command line: what cannot be written is their one line.

    `example` is a name that would do. A device or pipe is refused: renaming over it would replace the device itself.
    """
    if not target.name or target.is_dir():
        raise InputError(f"{target}: is a folder; give the name of a file, like {example}")
    if target.exists() and not target.is_file():
        raise InputError(f"{target}: is a device or pipe; give the name of a file, like {example}")
    try:
        write_text(target, text)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from None


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
