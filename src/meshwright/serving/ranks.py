"""What a running vLLM says of itself in its log: which rank each worker is, and how much KV cache it has.

In: the text of the log. Out: `ReportedRank`s and `ReportedCache`, to be compared with layout's vllm order and with the
plan. Lines are those of vLLM 0.32; workers bear their coordinates in their names, and only those of axes above one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from meshwright.layout.config import HybridParallelConfig
from meshwright.layout.grid import rank_layout

SPEAKER = re.compile(r"\((?P<name>(?:Worker|VllmWorker|EngineCore)[^ ()]*) pid=(?P<pid>\d+)\)")
JOINED = re.compile(r"world_size=(\d+) rank=(\d+) local_rank=(\d+)")
NAMED = {axis: re.compile(rf"_{axis.upper()}(\d+)") for axis in ("dp", "pp", "tp")}
CACHE = re.compile(r"(?:GPU|CPU) KV cache size: ([\d,]+) tokens")
CONCURRENCY = re.compile(r"Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x")


@dataclass(frozen=True, order=True)
class ReportedRank:
    """A worker: its rank in the engine's world and the coordinates that its name says."""

    rank: int
    dp: int
    pp: int
    tp: int


@dataclass(frozen=True)
class ReportedCache:
    """Tokens of KV cache of one engine, and requests of the longest length that they hold."""

    tokens: int
    concurrency: float | None


def reported_ranks(log: str, config: HybridParallelConfig) -> tuple[ReportedRank, ...]:
    """Every worker of the log by rank. Replicas that share nothing count from 0 each in vLLM; here they follow one
    another, as the layout numbers them."""
    rank_of: dict[str, int] = {}
    names: dict[str, str] = {}
    for line in log.splitlines():
        speaker = SPEAKER.search(line)
        if speaker is None:
            continue
        pid, name = speaker["pid"], speaker["name"]
        if len(name) > len(names.get(pid, "")) and not name.startswith("Vllm"):
            names[pid] = name
        joined = JOINED.search(line)
        if joined is not None:
            rank_of[pid] = int(joined[2])
    found: list[ReportedRank] = []
    replica = config.pp * config.tp
    for pid, rank in rank_of.items():
        place = {axis: int(m[1]) if (m := pattern.search(names[pid])) else 0 for axis, pattern in NAMED.items()}
        if rank >= replica:  # numbered over all replicas
            found.append(ReportedRank(rank, place["dp"], place["pp"], place["tp"]))
            continue
        # replicas of a dense model are worlds of their own, whose workers do not say which: equal ones are counted
        dp = place["dp"] or sum((f.pp, f.tp) == (place["pp"], place["tp"]) for f in found)
        found.append(ReportedRank(dp * replica + rank, dp, place["pp"], place["tp"]))
    return tuple(sorted(found))


def expected_ranks(config: HybridParallelConfig) -> tuple[ReportedRank, ...]:
    """The same from layout's vllm order."""
    layout = rank_layout(config, "vllm")
    ranks = range(layout.world_size)
    places = layout.coordinates(list(ranks))
    dp = places["external_dp"] * layout.dense.sizes["dp"] + places["dp"]
    return tuple(ReportedRank(r, int(dp[r]), int(places["pp"][r]), int(places["tp"][r])) for r in ranks)


def reported_cache(log: str) -> ReportedCache | None:
    """The first engine's KV cache, where the log says it."""
    tokens = CACHE.search(log)
    if tokens is None:
        return None
    concurrency = CONCURRENCY.search(log)
    return ReportedCache(int(tokens[1].replace(",", "")), float(concurrency[2]) if concurrency else None)
