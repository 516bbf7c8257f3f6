"""Words for what is wrong in a plan: pieces of one-line errors."""

from __future__ import annotations

from typing import Any

from meshwright.errors import suggestion


def hint(key: str, known: list[str]) -> str:
    return suggestion(key[:80], known) or f"; known: {', '.join(known)}"


def short(value: Any) -> str:
    """A value as a short piece of one line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
