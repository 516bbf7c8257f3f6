"""A measured cluster as a TOML file that the planner reads (--cluster FILE.toml).

In: a `Cluster` whose accelerator and links were measured. Out: the text; `hardware.load` reads it back equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from meshwright.files import write_named
from meshwright.hardware import Accelerator, Cluster, Link


def cluster_toml(cluster: Cluster, heading: str) -> str:
    """The file: comment, accelerator, links, cluster."""
    device, name = cluster.accelerator, cluster.name
    lines = [f"# {' '.join(heading.split())}", *_section(f"accelerators.{_key(device.name)}", _plain(device))]
    links = {link.name: link for link in (cluster.intra, cluster.inter)}
    for link in links.values():
        lines += _section(f"links.{_key(link.name)}", _plain(link))
    table = _plain(cluster) | {
        "accelerator": device.name,
        "intra": cluster.intra.name,
        "inter": cluster.inter.name,
        "nics_per_gpu": 1.0,  # the bandwidth between nodes is written per device already
    }
    return "\n".join([*lines, *_section(f"clusters.{_key(name)}", table)]) + "\n"


def write_cluster(cluster: Cluster, heading: str, path: Path) -> None:
    """Write the file whole or not at all."""
    write_named(path, cluster_toml(cluster, heading), "cluster.toml")


def _plain(item: Accelerator | Link | Cluster) -> dict[str, Any]:
    found = {f.name: getattr(item, f.name) for f in fields(item) if f.name != "name"}
    return {key: value for key, value in found.items() if value is not None and value not in ({}, "")}


def _section(name: str, table: Mapping[str, Any]) -> list[str]:
    flat: list[str] = []
    inner: list[str] = []
    for key, value in table.items():
        if isinstance(value, dict):
            entries = cast("dict[str, Any]", value)
            inner += [f"[{name}.{key}]", *(f"{_key(k)} = {_value(v)}" for k, v in entries.items())]
        else:
            flat.append(f"{key} = {_value(value)}")
    return ["", f"[{name}]", *flat, *inner]


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, float):
        return f"{value:.1f}" if value.is_integer() else f"{value:.6g}"
    return str(value)


def _key(name: str) -> str:
    bare = name and all(c.isascii() and (c.isalnum() or c in "-_") for c in name)
    return name if bare else _quoted(name)


def _quoted(text: str) -> str:
    """A basic string: quotes, backslashes and control characters escaped."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() or c == " " else f"\\U{ord(c):08x}" for c in escaped) + '"'
