"""`meshwright scale`: the best plan at every number of GPUs, and the efficiency lost to each axis on the way up."""

from __future__ import annotations

from typing import Annotated

import typer

from meshwright.commands import options as o
from meshwright.commands import output
from meshwright.commands.inputs import load_cluster, load_model, load_stack, needed
from meshwright.commands.jobs import WorkloadOptions
from meshwright.errors import InputError

GpuCounts = Annotated[
    str,
    typer.Option("--gpus", help="GPU counts: 8..16384 (doubling), or a list 64,128,1024.", metavar="A..B",
                 rich_help_panel=o.CLUSTER),
]  # fmt: skip
Weak = Annotated[
    bool,
    typer.Option("--weak/--strong", help="Batch per GPU kept, or global batch kept.", rich_help_panel=o.WORKLOAD),
]


def scale(
    model: o.Model,
    cluster: o.ClusterName = None,
    gpus: GpuCounts = "8..16384",
    weak: Weak = True,
    global_batch: o.GlobalBatch = None,
    seq: o.Seq = None,
    gpus_per_node: o.GpusPerNode = None,
    reserved_gib: o.ReservedGib = None,
    precision: o.PrecisionName = None,
    optimizer: o.OptimizerName = None,
    stack: o.StackName = None,
    as_json: o.Json = False,
) -> None:
    """How far a job scales: best plan, speed and efficiency from few GPUs to many.

    With --weak the global batch is that of the largest count and shrinks in proportion; with --strong it stays.
    """
    from meshwright.commands.progress import search_progress
    from meshwright.planner.constraints import Constraints
    from meshwright.planner.scale import scaling
    from meshwright.report.scale_tables import scaling_document, scaling_report

    counts = gpu_counts(gpus)
    spec = load_model(model)
    machine = load_cluster(cluster, gpus_per_node=gpus_per_node, reserved_gib=reserved_gib)
    workload = WorkloadOptions(seq=seq, optimizer=optimizer).over(None)
    batch = needed("--global-batch", global_batch, 2048)
    fixed = Constraints() if precision is None else Constraints(precision=precision)
    with search_progress("scaling") as progress:
        result = scaling(spec, machine, workload, counts, batch, weak, None, fixed, load_stack(stack), progress)
    if as_json:
        output.show_json(scaling_document(result, spec, machine, workload))
    else:
        output.show(scaling_report(result, spec, machine, workload))


def gpu_counts(text: str) -> list[int]:
    """'8..64' -> [8, 16, 32, 64]; '8,24' -> [8, 24]."""
    first, dots, last = text.partition("..")
    words = [first, last] if dots else text.split(",")
    if not all(word.strip().isascii() and word.strip().isdigit() and len(word) <= 9 for word in words):
        raise InputError(f"--gpus {text!r} is not a range; give 8..16384, or counts like 64,128,1024")
    numbers = [int(word) for word in words]
    if min(numbers) < 1 or max(numbers) > o.LARGEST or (dots and numbers[0] > numbers[1]):
        raise InputError(f"--gpus {text!r} must rise from 1 or more to at most {o.LARGEST}")
    if not dots:
        return numbers
    counts = [numbers[0]]
    while counts[-1] * 2 <= numbers[1]:
        counts.append(counts[-1] * 2)
    return counts if counts[-1] == numbers[1] else [*counts, numbers[1]]
