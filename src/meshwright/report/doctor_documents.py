"""The doctor's findings as JSON documents: SI numbers, nothing rounded. In: the reports. Out: plain values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from meshwright.doctor.cures import Cure
from meshwright.doctor.efficiency import EfficiencyReport
from meshwright.doctor.links import LinkReport
from meshwright.doctor.oom import OomReport


def oom_document(report: OomReport) -> dict[str, Any]:
    """`meshwright doctor oom --json`."""
    memory = report.predicted.memory
    return {
        "fits": report.fits,
        "event": None if report.event is None else asdict(report.event),
        "fullest_stage": report.fullest_stage,
        "excess": report.excess,
        "capacity_bytes": memory.capacity_bytes,
        "predicted": [
            {"stage": s.stage, "bytes": s.total_bytes, "by_kind": {k.value: v for k, v in s.bytes_by_kind.items()}}
            for s in memory.stages
        ],
        "ranks": [asdict(rank) for rank in report.ranks],
        "cures": [_cure(report, cure) for cure in report.cures],
        "notes": list(report.notes),
    }


def _cure(report: OomReport, cure: Cure) -> dict[str, Any]:
    values = {name: value for name, value in asdict(cure).items() if name != "config"}
    return values | {"changes": list(cure.changes), "plan": report.plan_of(cure).to_dict()}


def efficiency_document(report: EfficiencyReport) -> dict[str, Any]:
    """`meshwright doctor efficiency --json`."""
    return {
        "steps": report.steps,
        "step_s": report.parts.step_s,
        "predicted_step_s": report.predicted.time.step_s,
        "mfu": report.mfu,
        "waterfall": [{"part": name, "seconds": value} for name, value in report.waterfall],
        "schedule_bubble_s": report.parts.schedule_bubble_s,
        "stage_compute_s": list(report.parts.stage_compute_s),
        "tp_compute_s": list(report.parts.tp_compute_s),
        "axes": [
            {
                "axis": use.axis,
                "transfer_s": use.transfer_s,
                "expected_s": use.expected_s,
                "step_bytes": use.step_bytes,
                "hosts": dict(use.hosts),
            }
            for use in report.axes
        ],
        "stragglers": [asdict(one) for one in report.stragglers],
        "faults": [asdict(fault) for fault in report.faults],
        "changes": [
            {
                "fault": change.fault,
                "words": change.words,
                "saved_s": change.saved_s,
                "plan": None if change.config is None else report.plan_of(change.config).to_dict(),
            }
            for change in report.changes
        ],
        "experts": None if report.experts is None else asdict(report.experts),
        "notes": list(report.notes),
    }


def links_document(report: LinkReport) -> dict[str, Any]:
    """`meshwright doctor links --json`."""
    return {
        "hosts": list(report.samples.hosts),
        "samples": [asdict(sample) | {"bytes_per_s": sample.bytes_per_s} for sample in report.samples.samples],
        "slow": [asdict(slow) for slow in report.slow],
        "intra": asdict(report.intra),
        "inter": None if report.inter is None else asdict(report.inter),
        "error": report.error,
    }
