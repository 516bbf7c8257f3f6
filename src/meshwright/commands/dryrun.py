"""`meshwright dryrun`: a plan's own program for any of its ranks, without hardware, against the cost model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from meshwright.commands import output
from meshwright.commands.options import Json
from meshwright.commands.progress import search_progress
from meshwright.commands.runtime_room import needs_runtime
from meshwright.errors import InputError

PlanFile = Annotated[str, typer.Argument(metavar="PLAN", help="A plan file of a training job; any number of ranks.")]
Ranks = Annotated[
    str | None,
    typer.Option("--ranks", help="Which ranks to run: numbers and 'last' like 0,last, or all. Else one per role."),
]
Save = Annotated[bool, typer.Option("--save", help="Write the result beside the plan, as PLAN.proof.json.")]
Unfolded = Annotated[
    bool, typer.Option("--unfolded", help="Run every microbatch, also those that do what the one before did.")
]


def dryrun(
    plan: PlanFile, ranks: Ranks = None, save: Save = False, unfolded: Unfolded = False, as_json: Json = False
) -> int:
    """Prove a plan without hardware: the real program runs on shapes alone, for one rank of every role.

    Every collective is compared with the cost model's ledger, to the call and the byte; traces of all stages must match
    and come to an end; live bytes are followed through the step: state must be what the model says to the byte, the
    peak beside it within 3 %. Exit code 1 says that something does not agree.
    """
    needs_runtime("dryrun")
    from meshwright.cost.from_plan import workload_of
    from meshwright.dryrun.document import proof_document
    from meshwright.dryrun.job import DryJob
    from meshwright.dryrun.proof import prove
    from meshwright.dryrun.roles import chosen_ranks
    from meshwright.files import write_text
    from meshwright.plan import Plan, TrainingWorkload
    from meshwright.plan.proved import proof_path
    from meshwright.report.dryrun_tables import proof_text
    from meshwright.runtime.model_config import transformers_config

    document = Plan.read(plan)
    if not isinstance(document.workload, TrainingWorkload):
        raise InputError(f"{plan}: plans a serving job; a dry run is of a training step")
    model = document.load_model()
    job = DryJob(document.parallel, transformers_config(document), document.workload.seq, not unfolded)
    chosen = chosen_ranks(ranks, model, document.parallel)
    with search_progress("ranks") as progress:
        proof = prove(job, model, workload_of(document.workload), chosen, progress)
    found = proof_document(proof, document.digest())
    if save:
        write_text(proof_path(Path(plan)), json.dumps(found, indent=1) + "\n")
    if as_json:
        output.show_json(found)
    else:
        output.show(Text(proof_text(found, [r.trace.memory.curve for r in proof.ranks])))
    return 0 if proof.agrees else 1
