"""Tables keep every figure from 80 columns on; only columns that may go are left out, and that is said."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from meshwright import HybridParallelConfig, Workload, estimate, load_cluster, load_model, search
from meshwright.layout.communication import communication_patterns
from meshwright.layout.grid import rank_layout
from meshwright.models import catalogue as models
from meshwright.models import load
from meshwright.planner.scale import scaling
from meshwright.report.catalogue_tables import clusters_table, models_table
from meshwright.report.estimate_tables import estimate_report
from meshwright.report.fitted_table import Drawing, table
from meshwright.report.layout_tables import layout_report
from meshwright.report.plan_tables import front_table, ranked_table
from meshwright.report.scale_tables import scaling_report

MODEL, WORK = load_model("llama-3.1-8b"), Workload(seq=4096)
WIDE = HybridParallelConfig(dp=4, tp=4, pp=16, cp=2, global_batch=64, zero=1, sequence_parallel=True)


def lines_of(renderable: RenderableType, width: int) -> list[str]:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get().splitlines()


def _ranked() -> RenderableType:
    found = search(MODEL, load_cluster("h100-sxm", nodes=2), WORK, 64)
    return ranked_table([*found.best[:2], estimate(MODEL, load_cluster("h100-sxm", nodes=64), WORK, WIDE)], "title")


def _front() -> RenderableType:
    return front_table(search(MODEL, load_cluster("h100-sxm", nodes=2), WORK, 64).pareto)


def _scaling() -> RenderableType:
    cluster = load_cluster("h100-sxm", nodes=1)
    return scaling_report(scaling(MODEL, cluster, WORK, (8, 16), 64), MODEL, cluster, WORK)


def _estimate() -> RenderableType:
    return estimate_report(
        estimate(MODEL, load_cluster("h100-sxm", nodes=64), WORK, WIDE), "heading", {"tp": "nvlink4"}
    )


def _layout() -> RenderableType:
    placed = rank_layout(HybridParallelConfig(dp=4, tp=8, pp=4), "default")
    return layout_report(placed, communication_patterns(placed, domain=8), 8, 8)


REPORTS: dict[str, Callable[[], RenderableType]] = {
    "ranked plans": _ranked,
    "front": _front,
    "scaling": _scaling,
    "estimate": _estimate,
    "layout": _layout,
    "clusters": lambda: clusters_table(
        load_cluster(name) for name in ("v100", "h100-96gb", "gb300-nvl72", "a100-ethernet")
    ),
    "models": lambda: models_table([load(entry.name) for entry in models()[:40]]),
}


@pytest.mark.parametrize("name", REPORTS)
def test_reports_fit_80_to_200_columns_and_nothing_is_cut(name: str) -> None:
    report = REPORTS[name]()
    for width in (80, 100, 120, 160, 200):
        lines = lines_of(report, width)
        assert max(map(len, lines)) <= width
        assert not any("…" in line for line in lines), (width, lines)


def example() -> RenderableType:
    made = table("t", "name", "first figure", "second figure", "third", left=1, expendable=("second figure",))
    made.add_row("a name of several words", "1,000,000", "2,222,222", "3")
    return made


def test_a_table_is_drawn_roomy_where_there_is_room() -> None:
    assert "first figure   second figure   third" in lines_of(example(), 80)[1]


def test_a_narrow_window_breaks_headings_then_leaves_out_what_may_go_and_says_so() -> None:
    broken, cut = lines_of(example(), 50), lines_of(example(), 30)
    assert "2,222,222" in "".join(broken)
    assert "2,222,222" not in "".join(cut)
    assert "(left out in this narrow window: second figure)" in " ".join(" ".join(cut).split())
    assert all(value in "".join(cut) for value in ("1,000,000", "3"))


@given(
    rows=st.lists(st.lists(st.integers(0, 10**6), min_size=4, max_size=4), min_size=1, max_size=5),
    width=st.integers(40, 120),
)
def test_figures_are_whole_or_their_column_is_named_as_left_out(rows: list[list[int]], width: int) -> None:
    made = table("", "words", "alpha", "beta", "gamma", "delta", expendable=("beta", "delta"))
    for row in rows:
        made.add_row("some words that may wrap", *map(str, row))
    lines = lines_of(made, width)
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    out = " ".join(lines).partition("(left out")[2]
    for row in rows:
        for name, value in zip(("alpha", "beta", "gamma", "delta"), row, strict=True):
            assert str(value) in words or name in out


def test_drawings_are_made_for_their_width() -> None:
    assert [len(lines_of(Drawing(lambda width: "x" * width), width)[0]) for width in (40, 90)] == [40, 90]
