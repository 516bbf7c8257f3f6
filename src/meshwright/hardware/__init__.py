"""Hardware: accelerators, links and clusters, by catalogue name or from a user's TOML (see docs/design.md)."""

from meshwright.hardware.load import accelerator, accelerators, check, clusters, custom, load, resize
from meshwright.hardware.spec import Accelerator, Cluster, Link
from meshwright.hardware.topology import (
    link_of_group,
    members_per_domain,
    members_per_domain_nested,
    segment,
    stays_inside,
)

__all__ = [
    "Accelerator",
    "Cluster",
    "Link",
    "accelerator",
    "accelerators",
    "check",
    "clusters",
    "custom",
    "link_of_group",
    "load",
    "members_per_domain",
    "members_per_domain_nested",
    "resize",
    "segment",
    "stays_inside",
]
