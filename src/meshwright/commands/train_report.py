"""What `meshwright train` says at the end: losses, the ledger of a step, and what was predicted beside it.

In: the outcomes of all ranks. Out: tables on a terminal, or one JSON document.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from meshwright.commands import output
from meshwright.plan import Plan, TrainingWorkload
from meshwright.report.doctor_tables import comparison_table
from meshwright.report.json_documents import dumps
from meshwright.report.ledger_tables import LedgerLine, compare_ledgers, ledger_table
from meshwright.report.numbers import size, whole

if TYPE_CHECKING:
    from meshwright.doctor.comparison import Comparison
    from meshwright.measurements import RankTimeline
    from meshwright.runtime.trainer import RankOutcome

SHOWN_LOSSES = 10


def ledger_lines(plan: Plan, outcomes: Sequence[RankOutcome]) -> list[LedgerLine]:
    """The last step's ledgers of all ranks beside the closed form's."""
    from meshwright.cost.from_plan import workload_of
    from meshwright.cost.traffic import RankPlace, rank_ledger

    assert isinstance(plan.workload, TrainingWorkload)
    model, workload = plan.load_model(), workload_of(plan.workload)
    places = {(o.stage, RankPlace(o.tp_rank, o.shard)) for o in outcomes}
    predicted = {place: rank_ledger(model, workload, plan.parallel, *place) for place in places}
    ranks = [(o.stage, o.ledger, predicted[o.stage, RankPlace(o.tp_rank, o.shard)]) for o in outcomes]
    return compare_ledgers(ranks)


def compare_with_prediction(plan: Plan, folder: Path) -> Comparison | None:
    """Predicted beside measured, where the plan names the machine that it ran on; left in the folder too."""
    if plan.cluster is None:
        return None
    from meshwright.doctor.comparison import COMPARISON_FILE, compare_run
    from meshwright.doctor.oom import question_of
    from meshwright.doctor.run_records import read_run
    from meshwright.files import write_text

    compared = compare_run(read_run(folder), question_of(plan, None, ours=True))
    if compared is not None:
        write_text(folder / COMPARISON_FILE, dumps(compared.document()) + "\n")
    return compared


def written_trace(outcomes: Sequence[RankOutcome], path: Path) -> list[RankTimeline]:
    """The timelines of the traced step (none where the run ended before it), written as a Chrome trace."""
    from meshwright.report.step_trace import step_trace
    from meshwright.simulation.chrome import write_document

    timelines = [o.timeline for o in outcomes if o.timeline is not None]
    if timelines:
        write_document(step_trace(timelines), path)
    return timelines


def show(
    outcomes: Sequence[RankOutcome],
    lines: list[LedgerLine] | None,
    compared: Comparison | None,
    folder: Path,
    timelines: list[RankTimeline] | None,
    as_json: bool,
) -> None:
    from meshwright.report.step_trace import overlap_document, step_report

    first = outcomes[0]
    if as_json:
        traced = {"overlap": overlap_document(timelines)} if timelines else {}
        output.show_json(train_document(outcomes, lines, folder, compared) | traced)
        return
    parts: list[RenderableType] = [Text(_losses(first)), Text(_summary(outcomes, folder))]
    if lines is not None:
        wrong = sum(not line.agrees for line in lines)
        verdict = "equal: calls and bytes, every axis, every rank" if not wrong else f"{wrong} lines DIFFER"
        text = f"what a rank of each stage sent in the last step; predicted and recorded are {verdict}"
        parts += [Text(""), ledger_table(lines), Text(text, style="" if not wrong else "bold red")]
    if compared is not None:
        parts += [Text(""), comparison_table(compared)]
    if timelines:
        parts += [Text(""), step_report(timelines)]
    output.show(Group(*parts))


def train_document(
    outcomes: Sequence[RankOutcome], lines: list[LedgerLine] | None, folder: Path, compared: Comparison | None = None
) -> dict[str, Any]:
    """The JSON of `meshwright train --json`."""
    first = outcomes[0]
    document: dict[str, Any] = {
        "ranks": len(outcomes),
        "first_step": first.first_step,
        "losses": list(first.losses),
        "diverged_at": first.diverged_at,
        "tokens_per_s": first.tokens_per_s,
        "peak_memory_bytes": max(o.peak_memory_bytes for o in outcomes),
        "checkpoint": None if first.checkpoint is None else str(first.checkpoint),
        "out": str(folder),
    }
    if compared is not None:
        document["comparison"] = compared.document()
    if lines is not None:
        document["ledger"] = {
            "agrees": all(line.agrees for line in lines),
            "lines": [
                {
                    "stage": line.stage,
                    **dict(zip(("axis", "phase", "collective", "what", "ranks"), line.line, strict=True)),
                    "recorded": {"calls": line.recorded[0], "bytes": line.recorded[1]},
                    "predicted": {"calls": line.predicted[0], "bytes": line.predicted[1]},
                }
                for line in lines
            ],
        }
    return document


def _losses(outcome: RankOutcome) -> str:
    """'step 1  5.5972' for about ten steps, the first and the last among them."""
    count = len(outcome.losses)
    shown = sorted({round(i * (count - 1) / (SHOWN_LOSSES - 1)) for i in range(SHOWN_LOSSES)}) if count > 1 else [0]
    return "\n".join(f"step {outcome.first_step + i + 1:>6}  loss {outcome.losses[i]:.4f}" for i in shown)


def _summary(outcomes: Sequence[RankOutcome], folder: Path) -> str:
    first = outcomes[0]
    if first.diverged_at is not None:
        return (
            f"the loss of step {first.diverged_at} is not finite: stopped; lower the learning rate, or clip gradients"
        )
    memory = size(max(o.peak_memory_bytes for o in outcomes))
    return (
        f"{len(first.losses)} steps on {len(outcomes)} ranks, {whole(first.tokens_per_s)} tokens/s, at most {memory} "
        f"per rank; metrics and {first.checkpoint.name if first.checkpoint else 'no checkpoint'} are in {folder}"
    )
