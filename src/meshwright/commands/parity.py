"""`meshwright parity`: the plan with all its ranks against one process with the plain model, in float64."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from meshwright.commands import output
from meshwright.commands.options import Json
from meshwright.commands.runtime_room import needs_runtime

if TYPE_CHECKING:
    from meshwright.runtime.parity_axes import PlanParity

LARGEST_PARAMETERS = 20_000_000
"""A larger model is shrunk unless --full-size is given: parity holds several float64 copies of it."""

PlanFile = Annotated[str, typer.Argument(metavar="PLAN", help="A plan file; at most 16 ranks.")]
Seq = Annotated[int, typer.Option("--seq", min=2, help="Tokens per sequence of the comparison.")]
FullSize = Annotated[bool, typer.Option("--full-size", help="Do not shrink the model and the batch.")]
EachAxis = Annotated[
    bool, typer.Option("--each-axis/--whole-only", help="Also run every axis and pair of axes by itself.")
]


def parity(
    plan: PlanFile, seq: Seq = 16, full_size: FullSize = False, each_axis: EachAxis = True, as_json: Json = False
) -> int:
    """Prove a plan right: loss, every gradient and every weight after 3 steps, against one process.

    Weights, batch and optimizer are the same on both sides; large models are shrunk (same family and kinds of layers).
    Exit code 1 says that they differ; the parameter where backward first goes wrong and the likely axis are named.
    """
    needs_runtime("parity")
    from meshwright.plan import Plan
    from meshwright.runtime.model_config import transformers_config
    from meshwright.runtime.parity import ParityJob
    from meshwright.runtime.parity_axes import compare_by_axis
    from meshwright.runtime.parity_shape import refuse_too_many_ranks, shrunk, without_dropout

    document = Plan.read(plan)
    refuse_too_many_ranks(document.parallel)
    model_config, config = without_dropout(transformers_config(document)), document.parallel
    shrink = not full_size and document.load_model().parameters > LARGEST_PARAMETERS
    if shrink:
        model_config, config = shrunk(model_config, config, seq)
    job = ParityJob(config, model_config, seq, seed=document.training.seed if document.training else 0)
    result = compare_by_axis(job, each_axis, progress=_announce)
    if as_json:
        output.show_json(parity_document(result, shrink))
    else:
        output.show(Text(_text(result, shrink)))
    return 0 if result.whole.passed else 1


def _announce(layout: str) -> None:
    """Progress goes to stderr: a run takes seconds per layout."""
    print(f"parity: {layout}", file=sys.stderr, flush=True)


def parity_document(result: PlanParity, shrink: bool) -> dict[str, Any]:
    """The JSON of `meshwright parity --json`."""
    divergent = result.first_divergent
    return {
        "passed": result.whole.passed,
        "worst_relative_difference": result.whole.worst_relative_difference,
        "tolerance": result.whole.tolerance,
        "parameters": result.whole.parameters,
        "loss": result.whole.loss,
        "loss_difference": result.whole.loss_difference,
        "model_shrunk": shrink,
        "combinations": [
            {
                "axes": list(c.axes),
                "layout": c.label,
                "passed": c.report.passed,
                "worst_relative_difference": c.report.worst_relative_difference,
                "worst_gradient": c.report.worst_gradient,
                "worst_weight": c.report.worst_weight,
            }
            for c in result.combinations
        ],
        "first_divergent": None if divergent is None else asdict(divergent) | {"axis": result.likely_cause},
        "not_compared": list(result.whole.not_compared),
    }


def _text(result: PlanParity, shrink: bool) -> str:
    width = max(len(c.label) for c in result.combinations)
    lines = [f"{'layout'.ljust(width)}  gradients  weights after 3 steps"]
    for c in result.combinations:
        verdict = "ok" if c.report.passed else "DIFFERS"
        lines.append(f"{c.label.ljust(width)}  {c.report.worst_gradient:9.1e}  {c.report.worst_weight:9.1e}  {verdict}")
    whole = result.whole
    size = " of a shrunk model" if shrink else ""
    lines.append(f"{whole.parameters} parameters{size} compared, loss {whole.loss:.6f}; largest relative difference")
    lines.append(f"{whole.worst_relative_difference:.1e} of at most {whole.tolerance:.0e}: " + _verdict(result))
    return "\n".join(lines)


def _verdict(result: PlanParity) -> str:
    if result.whole.passed:
        return "equal"
    divergent = result.first_divergent
    if divergent is None:
        return f"the loss differs or tensors were not compared {list(result.whole.not_compared)}"
    return (
        f"the {divergent.kind} of {divergent.parameter} ({divergent.copies}, stage {divergent.stage}) is the first to "
        f"differ, by {divergent.relative:.1e}; likely cause: {result.likely_cause}"
    )
