"""The hardware catalogue: TOML tables of accelerators, links and clusters, read into the dataclasses of `spec`.

In: the package's data files, or a user's TOML of the same form laid over them. Out: a `Catalogue`. Whatever is
wrong in a user's file (unknown key, wrong type, missing or hostile file) is an InputError that names the place.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from pydantic import TypeAdapter, ValidationError

from meshwright.errors import InputError, suggestion
from meshwright.hardware.spec import Accelerator, Cluster, Link

MAX_TOML_BYTES = 1 << 20
MOST_DOTS = 1000
"""Of one line: tomllib takes time with the square of the dots of a key."""
SECTIONS = ("accelerators", "links", "clusters")

Table = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Catalogue:
    """Everything that can be named. `aliases` maps ('accelerators' | 'clusters', other spelling) to the name."""

    accelerators: Mapping[str, Accelerator]
    links: Mapping[str, Link]
    clusters: Mapping[str, Cluster]
    aliases: Mapping[tuple[str, str], str]

    def accelerator(self, name: str) -> Accelerator:
        return _lookup(self.accelerators, self.aliases, "accelerators", name)

    def cluster(self, name: str) -> Cluster:
        return _lookup(self.clusters, self.aliases, "clusters", name)


def canonical(name: str) -> str:
    """The spelling used for look-up: lower case, with dashes."""
    return "-".join(name.strip().lower().replace("_", " ").replace("-", " ").split())


def _lookup(known: Mapping[str, T], aliases: Mapping[tuple[str, str], str], section: str, name: str) -> T:
    key = canonical(name)
    key = aliases.get((section, key), key)
    if key in known:
        return known[key]
    kind = section.removesuffix("s")
    hint = suggestion(key, known) or f"; known: {', '.join(sorted(known))}"
    raise InputError(f"unknown {kind} {name[:60]!r}{hint}")


@cache
def builtin() -> Catalogue:
    """The catalogue that ships with the package."""
    data = resources.files("meshwright.hardware") / "data"
    tables: Table = {}
    for file in ("accelerators.toml", "clusters.toml"):
        tables |= tomllib.loads((data / file).read_text(encoding="utf-8"))
    return assemble(tables, "the built-in catalogue", Catalogue({}, {}, {}, {}))


def read_catalogue(path: Path) -> tuple[Catalogue, tuple[str, ...]]:
    """The built-in catalogue with a user's file laid over it, and the names of the clusters the file defines."""
    tables = _read_toml(path)
    catalogue = assemble(tables, str(path), builtin())
    return catalogue, tuple(canonical(name) for name in tables.get("clusters", {}))


def _read_toml(path: Path) -> Table:
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        if path.stat().st_size > MAX_TOML_BYTES:
            raise InputError(f"{path}: larger than {MAX_TOML_BYTES >> 20} MiB, not a cluster file")
        text = path.read_text(encoding="utf-8")
        if any(line.count(".") > MOST_DOTS for line in text.splitlines()):
            raise InputError(f"{path}: nested too deeply")
        return tomllib.loads(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply") from None


def assemble(tables: Table, origin: str, base: Catalogue) -> Catalogue:
    """Tables of the three sections, checked and built, laid over `base`."""
    _known_keys(tables, SECTIONS, origin)
    sections = {section: _section(tables, section, origin) for section in SECTIONS}
    aliases = dict(base.aliases)
    for section in ("accelerators", "clusters"):
        aliases |= _take_aliases(sections[section], section, origin)
    accelerators = dict(base.accelerators)
    for name, table in sections["accelerators"].items():
        accelerators[name] = build(Accelerator, {**table, "name": name}, f"{origin}: accelerators.{name}")
    links = dict(base.links)
    for name, table in sections["links"].items():
        links[name] = build(Link, {**table, "name": name}, f"{origin}: links.{name}")
    partial = Catalogue(accelerators, links, {}, aliases)
    clusters = dict(base.clusters)
    for name, table in sections["clusters"].items():
        clusters[name] = _cluster(name, table, f"{origin}: clusters.{name}", partial)
    return Catalogue(accelerators, links, clusters, aliases)


def _section(tables: Table, section: str, origin: str) -> dict[str, Table]:
    content = tables.get(section, {})
    if not isinstance(content, dict):
        raise InputError(f"{origin}: {section} must be a table of tables, like [{section}.name]")
    result: dict[str, Table] = {}
    for name, table in cast(Table, content).items():
        if not isinstance(table, dict):
            raise InputError(f"{origin}: {section}.{name} must be a table, like [{section}.{name}]")
        result[canonical(name)] = dict(cast(Table, table))
    return result


def _take_aliases(section: dict[str, Table], kind: str, origin: str) -> dict[tuple[str, str], str]:
    """Remove `aliases` from the tables and return them."""
    taken: dict[tuple[str, str], str] = {}
    for name, table in section.items():
        aliases = table.pop("aliases", [])
        if not isinstance(aliases, list) or not all(isinstance(a, str) for a in cast(list[Any], aliases)):
            raise InputError(f"{origin}: {kind}.{name}.aliases must be a list of names")
        taken |= {(kind, canonical(alias)): name for alias in cast(list[str], aliases)}
    return taken


def _cluster(name: str, table: Table, where: str, catalogue: Catalogue) -> Cluster:
    """A cluster table with its accelerator and links resolved (by name, or given in place as a table)."""
    _known_keys(table, [f.name for f in fields(Cluster)], where)
    table = {"nodes": 1, **table, "name": name}
    device = table.get("accelerator")
    if isinstance(device, str):
        table["accelerator"] = _named(catalogue.accelerator, device, where)
    elif isinstance(device, dict):
        table["accelerator"] = build(Accelerator, {"name": f"{name}-device", **device}, f"{where}.accelerator")
    for side in ("intra", "inter"):
        link = table.get(side)
        if isinstance(link, str):
            if link not in catalogue.links:
                hint = suggestion(link, catalogue.links) or f"; known: {', '.join(sorted(catalogue.links))}"
                raise InputError(f"{where}.{side}: unknown link {link!r}{hint}")
            table[side] = catalogue.links[link]
        elif isinstance(link, dict):
            table[side] = build(Link, {"name": f"{name}-{side}", **link}, f"{where}.{side}")
    built = table.get("accelerator")
    if isinstance(built, Accelerator):
        table.setdefault("reserved_bytes", built.reserved_bytes)
    if "domain" not in table and "gpus_per_node" in table:
        table["domain"] = table["gpus_per_node"]
    cluster = build(Cluster, table, where)
    return _per_device(cluster)


def _named(find: Any, name: str, where: str) -> Accelerator:
    try:
        return find(name)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _per_device(cluster: Cluster) -> Cluster:
    """The cluster with the adapter's bandwidth turned into bandwidth per device."""
    inter = replace(cluster.inter, bandwidth=cluster.inter.bandwidth * cluster.nics_per_gpu)
    return replace(cluster, inter=inter)


def build(kind: type[T], table: Table, where: str) -> T:
    """A dataclass of `spec` from a table: keys known, required ones present, types exact, numbers sensible."""
    assert is_dataclass(kind)
    names = [f.name for f in fields(kind)]
    _known_keys(table, names, where)
    for f in fields(kind):
        required = f.default is MISSING and f.default_factory is MISSING
        if required and f.name not in table:
            raise InputError(f"{where}: {f.name} is missing")
    types = get_type_hints(kind)
    values = {name: _value(types[name], value, f"{where}.{name}") for name, value in table.items()}
    built = kind(**values)
    check_numbers(built, where)
    return built


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _value(kind: Any, value: object, where: str) -> Any:
    """One field, of exactly its type (a whole number may stand for a float)."""
    try:
        return _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{where}: {first['msg'].lower()}, got {str(first['input'])[:60]!r}") from None


ZERO_ALLOWED = ("latency_s", "reserved_bytes")


def check_numbers(item: Any, where: str) -> None:
    """Every number finite and positive (some may be zero); shares at most 1."""
    for f in fields(item):
        value = getattr(item, f.name)
        numbers = cast(dict[str, Any], value).items() if isinstance(value, dict) else [(f.name, value)]
        for name, number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if not math.isfinite(number) or number < 0 or (number == 0 and f.name not in ZERO_ALLOWED):
                least = "zero or more" if f.name in ZERO_ALLOWED else "above zero"
                raise InputError(f"{where}: {name} must be a number {least}, got {number}")
            if f.name == "efficiency" and number > 1:
                raise InputError(f"{where}: efficiency is a share of the link, at most 1, got {number}")


def _known_keys(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in table:
        if key not in known:
            hint = suggestion(key, known) or f"; known: {', '.join(known)}"
            raise InputError(f"{where}: unknown key {key!r}{hint}")
