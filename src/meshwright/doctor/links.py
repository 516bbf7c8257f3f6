"""`doctor links`: what was measured of a job's links, the slow ones among them, and the cluster file that follows.

In: `LinkSamples`. Out: `LinkReport`: the samples; links, hosts and ranks slower than their like;
and the two `Link`s (inside a host, between hosts) with which the cost model's own formulas explain the samples best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from meshwright.cost.collectives import call_seconds
from meshwright.cost.device import network
from meshwright.hardware import Cluster, Link
from meshwright.ledger import Collective
from meshwright.measurements import LinkSample, LinkSamples

SLOW = 2.0
"""Times the lower quartile of its like from which a link is called slow."""
BULK_BYTES = 2**20
"""Calls from here on are about bandwidth, smaller ones about latency."""


@dataclass(frozen=True)
class SlowLink:
    """`kind`: 'link' between two ranks or of one group, 'rank', or 'host': every link of it is slow. `times` the lower
    quartile of links of the same kind."""

    kind: str
    name: str
    ranks: tuple[int, ...]
    times: float


@dataclass(frozen=True)
class LinkReport:
    """`error`: median relative error of the fitted links on the samples. `inter` is None on one host."""

    samples: LinkSamples
    slow: tuple[SlowLink, ...]
    intra: Link
    inter: Link | None
    error: float


def report_links(samples: LinkSamples, cluster: Cluster, others: Sequence[LinkSamples] = ()) -> LinkReport:
    """Everything about the links; `cluster` gives the shape (ranks per host, cores shared) and where to start from.
    `others` were measured with other numbers of ranks on the same machines and count in the fit."""
    intra, inter, error = fit_links((samples, *others), cluster)
    return LinkReport(samples, tuple(slow_links(samples)), intra, inter, error)


def shape_of(samples: LinkSamples, cluster: Cluster, cores: float | None) -> Cluster:
    """The cluster in the shape of the measured job: hosts as nodes. `cores`: those that a host's ranks share."""
    hosts = list(dict.fromkeys(samples.hosts))
    per_host = max(samples.hosts.count(host) for host in hosts)
    return replace(cluster, nodes=len(hosts), gpus_per_node=per_host, domain=per_host, shared_cores=cores)


def slow_links(samples: LinkSamples) -> list[SlowLink]:
    """Bulk calls slower than SLOW times the lower quartile of their like: same axis, collective and size, and inside a
    host or between two alike. Links of one host or rank that are all slow are that host's or rank's."""
    like: dict[tuple[str, str, int, bool], list[LinkSample]] = {}
    for sample in samples.samples:
        if sample.call_bytes >= BULK_BYTES:
            key = (sample.axis, sample.collective, sample.call_bytes, len(sample.hosts) > 1)
            like.setdefault(key, []).append(sample)
    worst: dict[tuple[int, ...], float] = {}
    fine: set[tuple[int, ...]] = set()
    for alike in like.values():
        if len(alike) < 3:
            continue  # of two, neither is the odd one
        usual = float(np.quantile([s.seconds for s in alike], 0.25))  # a host's links may be half of them all
        for sample in alike:
            times = sample.seconds / usual
            if times >= SLOW:
                worst[sample.ranks] = max(times, worst.get(sample.ranks, 0.0))
            else:
                fine.add(sample.ranks)
    return _attributed(worst, fine - worst.keys(), samples.hosts)


def _attributed(
    worst: dict[tuple[int, ...], float], fine: set[tuple[int, ...]], hosts: Sequence[str]
) -> list[SlowLink]:
    """Slow links, gathered under a host or rank to which all of them (and no fine one) belong."""
    left = dict(worst)
    found: list[SlowLink] = []
    by_host: list[tuple[str, str, Callable[[tuple[int, ...]], bool]]] = [
        ("host", host, lambda ranks, h=host: len({hosts[r] for r in ranks}) > 1 and h in {hosts[r] for r in ranks})
        for host in dict.fromkeys(hosts)
    ]
    by_rank: list[tuple[str, str, Callable[[tuple[int, ...]], bool]]] = [
        ("rank", f"rank {rank}", lambda ranks, r=rank: r in ranks) for rank in range(len(hosts))
    ]
    for kind, name, belongs in by_host + by_rank:
        own = [ranks for ranks in left if belongs(ranks)]
        if len(own) > 1 and not any(belongs(ranks) for ranks in fine):
            members = tuple(r for r, h in enumerate(hosts) if h == name) if kind == "host" else (int(name.split()[1]),)
            found.append(SlowLink(kind, name, members, max(left[ranks] for ranks in own)))
            for ranks in own:
                del left[ranks]
    for ranks, times in left.items():
        places = ", ".join(dict.fromkeys(hosts[r] for r in ranks))
        found.append(SlowLink("link", f"ranks {', '.join(map(str, ranks))} ({places})", ranks, times))
    return sorted(found, key=lambda s: -s.times)


@dataclass(frozen=True)
class _Timed:
    """A sample and how many ranks took turns on each core while it was measured."""

    sample: LinkSample
    turns: float


def fit_links(measured: Sequence[LinkSamples], cluster: Cluster) -> tuple[Link, Link | None, float]:
    """Latency and bandwidth inside a host, then between hosts, that make the squared log error least. All groups of an
    axis ran at once, so ranks that share cores took turns."""
    source = f"measured by meshwright doctor links, {measured[0].software}"
    timed = [_Timed(s, _turns(run, s, cluster)) for run in measured for s in run.samples]
    groups = [t for t in timed if t.sample.axis != "pair"]
    inside = [t for t in groups if len(t.sample.hosts) == 1] or [t for t in timed if len(t.sample.hosts) == 1]
    between = [t for t in groups if len(t.sample.hosts) > 1]
    fitted = cluster
    if inside:
        fitted = _fit(fitted, "intra", inside)
    if between:
        fitted = _fit(fitted, "inter", between)
    errors = _errors(fitted, inside + between)
    error = float(np.median(np.abs(np.expm1(errors)))) if len(errors) else 0.0
    intra = replace(fitted.intra, source=source) if inside else fitted.intra
    return intra, replace(fitted.inter, source=source) if between else None, error


def _turns(run: LinkSamples, sample: LinkSample, cluster: Cluster) -> float:
    if cluster.shared_cores is None or sample.axis == "pair":
        return 1.0
    crowd = max(run.hosts.count(host) for host in sample.hosts)
    return max(1.0, crowd / cluster.shared_cores)


def _fit(cluster: Cluster, side: str, samples: Sequence[_Timed]) -> Cluster:
    """The cluster with the link of a side ('intra', 'inter') found by a coordinate search in shrinking factors."""
    best = _with(cluster, side, Link(f"{cluster.name}-{side}", 1e9, 1e-4, efficiency=1.0))
    least = float(np.sum(_errors(best, samples) ** 2))
    factor = 4.0
    while factor > 1.02:
        better = False
        for wider, longer in ((factor, 1.0), (1.0 / factor, 1.0), (1.0, factor), (1.0, 1.0 / factor)):
            link = best.intra if side == "intra" else best.inter
            moved = replace(link, bandwidth=link.bandwidth * wider, latency_s=link.latency_s * longer)
            tried = _with(cluster, side, moved)
            found = float(np.sum(_errors(tried, samples) ** 2))
            if found < least:
                best, least, better = tried, found, True
        factor = factor if better else factor**0.5
    return best


def _with(cluster: Cluster, side: str, link: Link) -> Cluster:
    return replace(cluster, intra=link) if side == "intra" else replace(cluster, inter=link)


def _errors(cluster: Cluster, samples: Sequence[_Timed]) -> NDArray[np.float64]:
    """log(predicted / measured)."""
    logs = np.zeros(len(samples))
    constants = network()
    for collective in {t.sample.collective for t in samples}:
        rows = [i for i, t in enumerate(samples) if t.sample.collective == collective]
        few = [samples[i].sample for i in rows]
        seconds = call_seconds(
            Collective(collective),
            cluster,
            constants,
            np.array([len(s.ranks) for s in few]),
            np.array([_stride(s.ranks) for s in few]),
            np.array([float(s.call_bytes) for s in few]),
        )
        turns = np.array([samples[i].turns for i in rows])
        logs[rows] = np.log(seconds * turns / np.array([s.seconds for s in few]))
    return logs


def _stride(ranks: tuple[int, ...]) -> int:
    return max(1, min((abs(b - a) for a, b in pairwise(ranks)), default=1))


def measured_cluster(report: LinkReport, shape: Cluster, name: str) -> Cluster:
    """The cluster with the links that were measured; what was not (no second host) stays as it was."""
    intra = replace(report.intra, name=f"{name}-intra")
    inter = shape.inter if report.inter is None else replace(report.inter, name=f"{name}-inter")
    return replace(shape, name=name, intra=intra, inter=inter, nics_per_gpu=1.0)
