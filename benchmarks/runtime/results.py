"""What readings say: medians over rounds, ratios to the ideal, peers beside. Readings in, one JSON document out.

Two ideals of CPU seconds: the plain process alone on the machine (the issue's, which decides `within_limit`), and one
of two plain processes at once, which lose to each other what two ranks lose: caches, memory, shared execution units.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from benchmarks.runtime.measure import Reading
from benchmarks.runtime.work import LAYOUTS, WALL_LIMIT, Layout


class Readings:
    """Readings of all rounds by kind (alone, two at once, both cores, layout, peer) and name; a peer's may be the error
    that it ended with."""

    def __init__(self) -> None:
        self._by_name: dict[tuple[str, str], list[Reading | str]] = defaultdict(list)

    def add(self, kind: str, name: str, reading: Reading | str) -> None:
        self._by_name[kind, name].append(reading)

    def has(self, kind: str, name: str) -> bool:
        return (kind, name) in self._by_name

    def row(self, kind: str, name: str) -> dict[str, Any]:
        """Medians over rounds, or the error."""
        rounds = self._by_name[kind, name]
        failed = [reading for reading in rounds if isinstance(reading, str)]
        if failed:
            return {"error": failed[0]}
        good = [reading for reading in rounds if isinstance(reading, Reading)]
        return {
            "cpu_s_mean": statistics.median(r.cpu_s_mean for r in good),
            "cpu_s_slowest_rank": statistics.median(r.cpu_s_slowest_rank for r in good),
            "wall_s": statistics.median(r.wall_s for r in good),
            "first_loss": good[0].loss,
        }


def document(readings: Readings, names: list[str]) -> dict[str, Any]:
    result: dict[str, Any] = {"plain": {}, "layouts": {}}
    for name in names:
        layout = LAYOUTS[name]
        if layout.work not in result["plain"]:
            result["plain"][layout.work] = _plain(readings, layout.work)
        result["layouts"][name] = _layout(readings, name, layout, result["plain"][layout.work])
    return result


def _plain(readings: Readings, work: str) -> dict[str, Any]:
    alone, two = readings.row("alone", work), readings.row("two at once", work)
    row = alone | {"two_at_once_cpu_s": two["cpu_s_mean"], "machine_share": two["cpu_s_mean"] / alone["cpu_s_mean"]}
    if readings.has("both cores", work):
        row["both_cores_wall_s"] = readings.row("both cores", work)["wall_s"]
    return row


def _layout(readings: Readings, name: str, layout: Layout, plain: dict[str, Any]) -> dict[str, Any]:
    row = readings.row("layout", name)
    ideal = plain["cpu_s_mean"] / layout.config.world_size
    row["mean_over_ideal"] = row["cpu_s_mean"] / ideal
    row["slowest_over_ideal"] = row["cpu_s_slowest_rank"] / ideal
    row["mean_over_ideal_beside_another"] = row["mean_over_ideal"] / plain["machine_share"]
    if layout.cpu_limit is not None:
        row |= {"limit": layout.cpu_limit, "within_limit": row["mean_over_ideal"] <= layout.cpu_limit}
    if layout.wall_ideal is not None and "both_cores_wall_s" in plain:
        row["wall_over_ideal"] = row["wall_s"] / layout.wall_ideal(plain["wall_s"], plain["both_cores_wall_s"])
        row["wall_within_limit"] = row["wall_over_ideal"] <= WALL_LIMIT
    row["peers"] = {peer: readings.row("peer", peer) for peer in layout.peers if readings.has("peer", peer)}
    ran = [peer["wall_s"] for peer in row["peers"].values() if "wall_s" in peer]
    if ran:
        row["ahead_of_every_peer"] = row["wall_s"] < min(ran)
    return row


def lines(result: dict[str, Any]) -> Iterator[str]:
    for work, row in result["plain"].items():
        both = f", {row['both_cores_wall_s']:.2f} s with both cores" if "both_cores_wall_s" in row else ""
        yield (
            f"plain transformers ({work}): {row['cpu_s_mean']:.2f} CPU s and {row['wall_s']:.2f} s a step{both}; "
            f"two at once {row['two_at_once_cpu_s']:.2f} CPU s each ({row['machine_share']:.3f} x)"
        )
    for name, row in result["layouts"].items():
        limit = f"; limit {row['limit']:.2f}: {'met' if row['within_limit'] else 'MISSED'}" if "limit" in row else ""
        yield (
            f"{name}: {row['cpu_s_mean']:.2f} CPU s per rank and step, {row['mean_over_ideal']:.3f} x the ideal "
            f"(slowest rank {row['slowest_over_ideal']:.3f}, ideal beside another process "
            f"{row['mean_over_ideal_beside_another']:.3f}{limit})"
        )
        if "wall_over_ideal" in row:
            verdict = "met" if row["wall_within_limit"] else "MISSED"
            ratio = f"{row['wall_over_ideal']:.3f} x the ideal"
            yield f"  {row['wall_s']:.2f} s, {ratio}; limit {WALL_LIMIT:.2f}: {verdict}"
        for peer, other in row["peers"].items():
            yield (
                f"  {peer}: {other['error']}"
                if "error" in other
                else f"  {peer}: {other['wall_s']:.2f} s, {other['cpu_s_mean']:.2f} CPU s (ours {row['wall_s']:.2f} s)"
            )
