"""Read a file of JSON lines from outside: one object a line, nothing trusted.

In: a path. Out: the objects as typed `Fields`, each labelled `file:line` for messages. A line that is not a JSON
object, is too long or holds NaN is an InputError that names its number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, cast

from meshwright.errors import InputError
from meshwright.models.fields import Fields

LONGEST_LINE_BYTES = 1_000_000
MOST_ROWS = 1_000_000


def read_rows(path: Path) -> Iterator[Fields]:
    """The rows of a file; blank lines are passed over."""
    if not path.exists():
        raise InputError(f"{path}: no such file; give a file of measurements, one JSON object a line")
    if not path.is_file():
        raise InputError(f"{path}: not a file; give a file of measurements, one JSON object a line")
    number = rows = 0
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE_BYTES + 1):
            number += 1
            if len(line) > LONGEST_LINE_BYTES:
                raise InputError(f"{path.name}:{number}: longer than {LONGEST_LINE_BYTES:,} bytes; one row a line")
            if not line.strip():
                continue
            rows += 1
            if rows > MOST_ROWS:
                raise InputError(f"{path.name}: more than {MOST_ROWS:,} rows; split the file")
            yield _row(line, f"{path.name}:{number}")
    if not rows:
        raise InputError(f"{path}: holds no rows; give one JSON object a line")


def _row(line: bytes, label: str) -> Fields:
    try:
        value: object = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise InputError(f"{label}: not UTF-8 text") from error
    except RecursionError as error:
        raise InputError(f"{label}: nested too deeply") from error
    except ValueError as error:  # also integers of too many digits
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"{label}: not valid JSON ({reason[:80]})") from error
    if not isinstance(value, dict):
        raise InputError(f"{label}: must be a JSON object, got {type(value).__name__}")
    return Fields(cast("dict[str, object]", value), label)


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number")
