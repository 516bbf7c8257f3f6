"""The one exception of this room: a row that cannot be scored, with the reason that the report prints."""

from __future__ import annotations


class SkippedError(Exception):
    """The row says too little, or names what the catalogue lacks. Not a defect of the row's form (InputError)."""
