"""A proof as the JSON document of `meshwright dryrun --json`, and the file that stands beside a plan.

The file holds the plan's digest and the verdict: `proved` tells whether it still speaks of this plan.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from meshwright.dryrun.proof import Proof, RankProof
from meshwright.dryrun.tracker import Peak
from meshwright.ledger import TrafficEntry


def proof_document(proof: Proof, digest: str) -> dict[str, Any]:
    """Everything that was found."""
    return {
        "agrees": proof.agrees,
        "digest": digest,
        "ranks": [_rank(r) for r in proof.ranks],
        "hangs": [asdict(f) for f in proof.findings],
        "matched_ranks": list(proof.matched),
        "seconds": {"tracing": proof.tracing_s, "matching": proof.matching_s},
    }


def _rank(proof: RankProof) -> dict[str, Any]:
    memory = proof.trace.memory
    return {
        "rank": proof.trace.rank,
        "coordinate": proof.trace.coordinate,
        "agrees": proof.agrees,
        "seconds": proof.trace.seconds,
        "microbatches_repeated": proof.trace.folded,
        "predicted": [_line(e) for e in proof.predicted],
        "traced": [_line(e) for e in proof.traced],
        "differences": [asdict(d) for d in proof.differences],
        "memory": {
            "predicted": {str(k): n for k, n in proof.predicted_memory.items()},
            "traced": {str(k): n for k, n in memory.largest.items()},
            "differences": [asdict(d) for d in proof.memory_differences],
            "peak_judged": proof.peak_judged,
            "peak": _peak(memory.peak),
            "peak_without_state": _peak(memory.working) | {"total_bytes": memory.working.working_bytes},
        },
    }


def _peak(peak: Peak) -> dict[str, Any]:
    return {
        "total_bytes": peak.total_bytes,
        "bytes_by_kind": {str(k): n for k, n in peak.bytes_by_kind.items()},
        "action": peak.action,
        "module": peak.module,
    }


def _line(entry: TrafficEntry) -> dict[str, Any]:
    return {
        "axis": entry.axis,
        "collective": str(entry.collective),
        "phase": str(entry.phase),
        "what": entry.what,
        "group_size": entry.group_size,
        "calls": entry.calls,
        "total_bytes": entry.total_bytes,
    }
