"""`meshwright export`: a plan as the input of another framework or launcher."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshwright.commands import output

if TYPE_CHECKING:
    from meshwright.plan import Plan


class To(StrEnum):
    """Where a plan can go."""

    VLLM = "vllm"
    MEGATRON = "megatron"
    TORCHTITAN = "torchtitan"
    DEEPSPEED = "deepspeed"
    SLURM = "slurm"
    K8S = "k8s"


PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")]
Where = Annotated[To, typer.Option("--to", help="Framework or launcher.", show_default=False)]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="Write to this file.", show_default="stdout")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document: target, text, notes.")]


def export(plan: PlanFile, to: Where, out: Out = None, as_json: Json = False) -> None:
    """Write a plan as arguments or files of another framework; what it cannot express is refused with the reason."""
    from meshwright.export import Exported, Target
    from meshwright.export import export as exported
    from meshwright.files import write_named
    from meshwright.plan import Plan

    read = Plan.read(plan)
    made = (
        Exported(vllm_script(read), vllm_notes(read)) if to is To.VLLM else exported(read, Target(to.value), str(plan))
    )
    if out is not None:
        write_named(out, made.text, "exported.txt")
    if as_json:
        output.show_json({"target": to.value, "text": made.text, "notes": list(made.notes)})
        return
    if out is None:
        sys.stdout.write(made.text)
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)


def vllm_script(plan: Plan) -> str:
    """The commands of every node, as meshwright.serving makes them."""
    from meshwright.serving import VllmOptions, vllm_launch

    node_gpus = plan.load_cluster().gpus_per_node if plan.cluster is not None else None
    launch = vllm_launch(plan, VllmOptions(node_gpus=node_gpus))
    lines = [f"# node {p.node}, engine {p.engine}\n{p.shell()}" for p in launch.processes]
    return "\n".join(lines) + "\n"


def vllm_notes(plan: Plan) -> tuple[str, ...]:
    """What the commands do not say."""
    from meshwright.serving.pools import NOTE

    return (NOTE,) if getattr(plan.workload, "pool", None) else ()
