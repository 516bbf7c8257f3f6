"""What `make bench-runtime` concludes from readings: the plain process alone decides, a peer's failure is kept."""

from __future__ import annotations

import pytest
from benchmarks.runtime.measure import Reading
from benchmarks.runtime.results import Readings, document, lines
from benchmarks.runtime.work import LAYOUTS


def readings(tp2_cpu_s: float, peer: Reading | str) -> Readings:
    made = Readings()
    for kind, cpu_s, wall_s in (("alone", 10.0, 10.0), ("two at once", 12.0, 12.0), ("both cores", 10.0, 5.0)):
        made.add(kind, "llama", Reading(cpu_s, cpu_s, wall_s, 9.0))
    made.add("layout", "tp2", Reading(tp2_cpu_s, tp2_cpu_s, 5.2, 9.0))
    made.add("peer", "tp_plan", peer)
    return made


def test_the_ideal_of_a_pipeline_is_an_even_share_with_the_bubble_of_its_schedule():
    ideal = {name: LAYOUTS[name].wall_ideal for name in ("pp2", "pp2-2-microbatches", "pp2-zero-bubble")}
    found = {name: seconds(16.0, 0.0) for name, seconds in ideal.items() if seconds is not None}
    # 1F1B waits for a forward and a backward pass, ZB-H1 for a third of that
    assert found == pytest.approx({"pp2": 8 * 9 / 8, "pp2-2-microbatches": 8 * 3 / 2, "pp2-zero-bubble": 8 * 25 / 24})


@pytest.mark.parametrize(("cpu_s", "within"), [(5.4, True), (5.6, False)])
def test_the_plain_process_alone_decides_whether_the_limit_is_met(cpu_s: float, within: bool):
    row = document(readings(cpu_s, "none"), ["tp2"])["layouts"]["tp2"]
    assert row["within_limit"] is within
    assert row["mean_over_ideal"] == pytest.approx(cpu_s / 5)
    assert row["mean_over_ideal_beside_another"] == pytest.approx(cpu_s / 6)
    assert row["wall_over_ideal"] == pytest.approx(1.04)


def test_a_peer_that_failed_is_reported_with_its_error():
    result = document(readings(5.0, "exit code 1: no such thing"), ["tp2"])
    assert result["layouts"]["tp2"]["peers"] == {"tp_plan": {"error": "exit code 1: no such thing"}}
    assert "ahead_of_every_peer" not in result["layouts"]["tp2"]
    assert any("no such thing" in line for line in lines(result))


def test_a_layout_is_ahead_only_of_peers_that_are_slower():
    assert document(readings(5.0, Reading(6.0, 6.0, 5.3, 9.0)), ["tp2"])["layouts"]["tp2"]["ahead_of_every_peer"]
    assert not document(readings(5.0, Reading(6.0, 6.0, 5.1, 9.0)), ["tp2"])["layouts"]["tp2"]["ahead_of_every_peer"]
