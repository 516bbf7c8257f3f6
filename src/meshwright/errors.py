"""Errors meant for the person who typed something: one line, in their words, with the nearest valid values.

The command line prints an `InputError` and exits 2. Everything else that escapes is a defect.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from outside: a size, a name, a file. The message is one line and says how to mend it."""


def suggestion(word: str, choices: Iterable[str], limit: int = 3) -> str:
    """' (did you mean a, b?)' for the choices nearest to `word`, or ''."""
    near = difflib.get_close_matches(word.lower(), sorted(choices), n=limit, cutoff=0.5)
    return f" (did you mean {', '.join(near)}?)" if near else ""


def is_number(value: object) -> bool:
    """Whether an argument from outside is an int or a float, whatever its annotation says (booleans are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool)
