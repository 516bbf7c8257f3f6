"""Clusters by name or file, in the size a job wants.

In: a catalogue name or the path of a user's TOML, and overrides of nodes and devices. Out: a checked `Cluster`.
`custom` builds one from the few facts that a textbook question gives.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from meshwright.errors import InputError, is_number
from meshwright.hardware.catalogue import Catalogue, builtin, canonical, check_numbers, read_catalogue
from meshwright.hardware.spec import Accelerator, Cluster

MAX_GPUS = 10_000_000
"""Beyond any cluster; larger sizes are taken for a slip."""


def accelerators() -> tuple[Accelerator, ...]:
    """Every accelerator of the catalogue."""
    return tuple(builtin().accelerators.values())


def clusters() -> tuple[Cluster, ...]:
    """Every cluster of the catalogue, in its default size."""
    return tuple(builtin().clusters.values())


def accelerator(name: str) -> Accelerator:
    """The accelerator of a name or alias."""
    return builtin().accelerator(name)


def load(
    name_or_path: str | Path,
    *,
    nodes: int | None = None,
    gpus: int | None = None,
    gpus_per_node: int | None = None,
    reserved_bytes: int | None = None,
    oversubscription: float | None = None,
) -> Cluster:
    """A cluster by catalogue name, or by the path of a TOML file (`file.toml:name` where it defines several)."""
    cluster = _find(name_or_path)
    cluster = resize(cluster, nodes=nodes, gpus=gpus, gpus_per_node=gpus_per_node)
    if reserved_bytes is not None:
        cluster = replace(cluster, reserved_bytes=reserved_bytes)
    if oversubscription is not None:
        cluster = replace(cluster, oversubscription=oversubscription)
    return check(cluster)


def _find(name_or_path: str | Path) -> Cluster:
    text = str(name_or_path)
    path, _, chosen = text.partition(".toml:")
    if chosen:
        return _from_file(Path(path + ".toml"), chosen)
    if text.endswith(".toml") or "/" in text:
        return _from_file(Path(text), None)
    return builtin().cluster(text)


def _from_file(path: Path, chosen: str | None) -> Cluster:
    catalogue, defined = read_catalogue(path)
    if chosen is not None:
        return catalogue.cluster(chosen)
    if len(defined) == 1:
        return catalogue.clusters[defined[0]]
    if not defined:
        raise InputError(f"{path}: defines no cluster; add a table [clusters.NAME]")
    raise InputError(f"{path}: defines {len(defined)} clusters; name one, as {path}:{defined[0]}")


def count(name: str, value: object, least: int = 1) -> int:
    """`value` if it is a whole number of devices or nodes in range, else an InputError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name} must be a whole number, got {value!r}")
    if not least <= value <= MAX_GPUS:
        raise InputError(f"{name} must be between {least} and {MAX_GPUS:,}, got {value}")
    return value


def resize(
    cluster: Cluster, *, nodes: int | None = None, gpus: int | None = None, gpus_per_node: int | None = None
) -> Cluster:
    """The same kind of cluster with another number of nodes or devices.

    `gpus` must fill whole nodes or be less than one. A fast domain that was one node stays one node.
    """
    if nodes is not None:
        count("nodes", nodes)
    if gpus_per_node is not None:
        cluster = _with_node_size(cluster, count("gpus per node", gpus_per_node))
    per_node = cluster.gpus_per_node
    if gpus is not None:
        count("gpus", gpus)
        if nodes is not None and gpus_per_node is not None and gpus != nodes * per_node:
            raise InputError(f"{gpus} GPUs are not {nodes} nodes of {per_node}; leave one of the three out")
        if nodes is not None and gpus_per_node is None:
            cluster = _spread(cluster, gpus, nodes)
        elif gpus < per_node:
            cluster, nodes = _with_node_size(cluster, gpus), 1
        elif gpus % per_node:
            below = gpus // per_node * per_node
            raise InputError(
                f"{gpus} GPUs do not fill whole nodes of {per_node} ({cluster.name}); try {below} or {below + per_node}"
            )
        else:
            nodes = gpus // per_node
    cluster = cluster if nodes is None else replace(cluster, nodes=nodes)
    count("gpus", cluster.gpus)
    return cluster


def _spread(cluster: Cluster, gpus: int, nodes: int) -> Cluster:
    """`gpus` over `nodes`: whole nodes, or fewer devices on each."""
    per_node, rest = divmod(gpus, nodes)
    if rest or per_node > cluster.gpus_per_node:
        full = nodes * cluster.gpus_per_node
        raise InputError(f"{gpus} GPUs do not spread over {nodes} nodes of {cluster.gpus_per_node}; they hold {full}")
    return _with_node_size(cluster, per_node) if per_node != cluster.gpus_per_node else cluster


def _with_node_size(cluster: Cluster, per_node: int) -> Cluster:
    """The cluster with another number of devices per node."""
    domain = per_node if cluster.domain == cluster.gpus_per_node else cluster.domain
    if domain > per_node and domain % per_node:
        domain = domain // per_node * per_node  # whole nodes of the domain
    if domain < per_node and per_node % domain:
        raise InputError(f"gpus per node {per_node} must be a multiple of the fast domain of {domain} ({cluster.name})")
    return replace(cluster, gpus_per_node=per_node, domain=domain)


def check(cluster: Cluster) -> Cluster:
    """The cluster itself if its numbers make sense together, else an InputError."""
    where = f"cluster {cluster.name}"
    for item in (cluster, cluster.accelerator, cluster.intra, cluster.inter):
        check_numbers(item, where)
    count("gpus", cluster.gpus)
    if cluster.reserved_bytes >= cluster.accelerator.memory_bytes:
        raise InputError(f"{where}: reserved_bytes {cluster.reserved_bytes} leaves nothing of the device's memory")
    if cluster.oversubscription < 1:
        raise InputError(f"{where}: oversubscription is 1 (full bisection) or more, got {cluster.oversubscription}")
    small, large = sorted((cluster.domain, cluster.gpus_per_node))
    if large % small:
        raise InputError(f"{where}: domain ({cluster.domain}) and gpus_per_node must divide one another")
    return cluster


INTERCONNECTS = {
    "nvlink": ("a100-80gb", "a100-80gb"),
    "infiniband": ("a100-pcie", "a100-pcie"),
    "ethernet": ("a100-pcie", "a100-ethernet"),
}
"""Clusters whose links inside and between nodes stand for an interconnect that is named alone."""

BY_MEMORY = {
    16: "v100-16gb", 24: "a10", 32: "v100", 40: "a100-40gb", 48: "l40s", 80: "a100-80gb", 94: "h100-96gb",
    96: "h100-96gb", 141: "h200", 180: "b200", 192: "gb200-nvl72", 288: "b300",
}  # fmt: skip
"""The commonest cluster whose devices have this many GB."""


def custom(
    gpu_memory_gb: float, gpu_interconnect: str, gpus: int, *, accelerator: str | None = None, gpus_per_node: int = 8
) -> Cluster:
    """A cluster from bare facts, as textbook questions give them.

    'nvlink' is NVLink inside nodes of 8 with the InfiniBand usual for the device between them; 'infiniband' and
    'ethernet' are PCIe inside a node and that network between nodes. Without `accelerator`, the commonest one with
    that much memory is meant; a size no device has is an A100 with its memory changed.
    """
    if not is_number(gpu_memory_gb) or not 1 <= gpu_memory_gb <= 100_000:
        raise InputError(f"gpu_memory_gb must be between 1 and 100000, got {gpu_memory_gb!r}")
    kind = canonical(str(gpu_interconnect))
    if kind not in INTERCONNECTS:
        raise InputError(f"unknown interconnect {gpu_interconnect!r}; choose nvlink, infiniband or ethernet")
    catalogue = builtin()
    base = _by_memory(catalogue, gpu_memory_gb)
    if accelerator is not None:
        device = catalogue.accelerator(accelerator)
        same = [c for c in catalogue.clusters.values() if c.accelerator == device]
        base = same[0] if same else replace(base, accelerator=device)
    if kind != "nvlink" or not base.intra.name.startswith(("nvlink", "xgmi")):
        inside, between = (catalogue.clusters[name] for name in INTERCONNECTS[kind])
        base = replace(base, intra=inside.intra, inter=between.inter)
    named = replace(base, name=f"{base.accelerator.name}-{kind}")
    count("gpus", gpus)
    per_node = min(count("gpus per node", gpus_per_node), gpus)
    sized = replace(named, gpus_per_node=per_node, domain=per_node, nodes=1)
    return check(resize(sized, gpus=gpus))


def _by_memory(catalogue: Catalogue, gb: float) -> Cluster:
    name = BY_MEMORY.get(round(gb))
    if name is not None:
        return catalogue.clusters[name]
    base = catalogue.clusters["a100-80gb"]
    device = replace(base.accelerator, name=f"gpu-{gb:g}gb", memory_bytes=int(gb * 1e9))
    return replace(base, accelerator=device)
