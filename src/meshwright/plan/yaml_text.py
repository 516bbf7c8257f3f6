"""YAML as plans use it: plain mappings, lists, text and numbers. Out of hostile text comes an InputError, one line.

Refused, because a plan needs none of it and each has been used to hide or to blow up content: anchors and aliases,
tags, a key given twice, nesting deeper than a config can be.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from typing import Any, cast

import yaml

from meshwright.errors import InputError

MAX_DEPTH = 64


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader without aliases, tags and repeated keys, and with 1e-4 read as the number it is."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = cast(Any, self).peek_event()
        if event.anchor:  # of an alias too
            raise _refused(event, "anchors and aliases have no place in a plan")
        tag = getattr(event, "tag", None)
        if tag:
            raise _refused(event, f"the tag {str(tag)[:40]} has no place in a plan")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _refused(event, "nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)[:60]
            if name in seen:
                raise _refused(key, f"the key {name!r} stands twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot in 1.0e-4; people write 1e-4
cast(Any, _PlainLoader).add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _refused(thing: Any, why: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=why, problem_mark=thing.start_mark)


def load_yaml(text: str, origin: str) -> dict[Any, Any]:
    """The value of one YAML document."""
    try:
        value = yaml.load(text, Loader=_PlainLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{origin}{line}: {_one_line(error.problem or 'not valid YAML')}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{origin}: not valid YAML: {_one_line(str(error))}") from None
    except RecursionError:
        raise InputError(f"{origin}: nested too deeply") from None
    except (ValueError, OverflowError) as error:
        reason = "a number has too many digits" if "digits" in str(error) else _one_line(str(error))
        raise InputError(f"{origin}: a value cannot be read: {reason}") from None
    if not isinstance(value, dict):
        raise InputError(f"{origin}: a plan is a mapping with model, workload and parallel; this is not one")
    return cast("dict[Any, Any]", value)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def dump_yaml(value: dict[str, Any]) -> str:
    """YAML in the order given, lists of numbers on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that never writes an anchor, and writes lists of plain values on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _flow_list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    plain = all(isinstance(v, bool | int | float | str) or v is None for v in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=plain)


LINE_BREAKS = frozenset("\x85\u2028\u2029")
"""Characters that YAML 1.1 folds like line breaks, and that PyYAML writes bare in single quotes."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    """Plain where that is safe; in double quotes, escaped, where a reader would see a line break."""
    represent = cast("Callable[..., yaml.Node]", dumper.represent_scalar)  # pyright: ignore[reportUnknownMemberType]
    return represent("tag:yaml.org,2002:str", value, style='"' if LINE_BREAKS & set(value) else None)


_Dumper.add_representer(list, _flow_list)
_Dumper.add_representer(str, _text)
