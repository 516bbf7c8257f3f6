"""Pickles that hold plain data and nothing else, from files that nobody vouches for.

In: bytes. Out: numbers, text, lists and dicts, or an InputError. Whatever would name a class or function is refused
before it is looked up, and so is a pickle that asks for a memo larger than itself: the C unpickler would make room for
every index up to the largest one, 64 GiB for five bytes.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any, NoReturn

from meshwright.errors import InputError

_ARGUMENT = {op.code.encode("latin-1")[0]: 0 if op.arg is None else op.arg.n for op in pickletools.opcodes}
"""By opcode: bytes of the argument, or how its length is told."""
_LINE = pickletools.UP_TO_NEWLINE
_COUNTED = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
"""Bytes of the length that stands before the argument."""
_PUTS = {ord("q"): 1, ord("r"): 4}
_PUT, _STOP, _TWO_LINES = ord("p"), ord("."), (ord("c"), ord("i"))


class PlainUnpickler(pickle.Unpickler):
    """Looks nothing up."""

    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        raise InputError(f"a dump that asks for {module_name[:40]}.{global_name[:40]} is not one of torch's")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise InputError("a dump with persistent ids is not one of torch's")


def load_plain(content: bytes) -> object:
    """What a pickle holds; whatever a damaged one makes the unpickler raise is an InputError."""
    try:
        if _largest_memo(content) > len(content):
            raise InputError("a pickle that remembers more things than it has bytes")
        return PlainUnpickler(io.BytesIO(content)).load()
    except InputError:
        raise
    except Exception as error:  # not limited to UnpicklingError
        raise InputError(f"a damaged pickle ({type(error).__name__})") from None


def _largest_memo(content: bytes) -> int:
    """The largest index of the memo that the opcodes up to the end ask for."""
    at, largest = 0, 0
    while at < len(content) and content[at] != _STOP:
        code = content[at]
        at += 1
        length = _ARGUMENT[code]
        if code in _PUTS:
            largest = max(largest, int.from_bytes(content[at : at + length], "little"))
        if length == _LINE:
            for _ in range(2 if code in _TWO_LINES else 1):
                end = content.index(b"\n", at)
                if code == _PUT:
                    largest = max(largest, int(content[at:end]))
                at = end + 1
        elif length in _COUNTED:
            width = _COUNTED[length]
            at += width + int.from_bytes(content[at : at + width], "little")
        else:
            at += length
    return largest
