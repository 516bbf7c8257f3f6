"""`meshwright check-serving`: a running server against the truth - tokens, ranks, and what a load makes of it.

In: the plan that `meshwright serve` serves, and its weights. Out: exit code 0 where every greedy token is that of
unsharded transformers in float32, ranks are the layout's, and every request of the load is accounted for; else 1.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from meshwright.commands import output
from meshwright.commands.generate import WeightsFolder
from meshwright.commands.options import Json
from meshwright.commands.runtime_room import needs_runtime
from meshwright.errors import InputError
from meshwright.plan import Plan, ServingWorkload
from meshwright.serving.client import AnswerError, Completion, complete
from meshwright.serving.load import LoadPlan, LoadReport, run_load
from meshwright.serving.model import weights_folder
from meshwright.serving.ranks import expected_ranks, reported_ranks
from meshwright.serving.server import ServerState

if TYPE_CHECKING:
    from meshwright.runtime.generation.reference import ReferenceAnswer

PlanFile = Annotated[str, typer.Argument(metavar="PLAN", help="The plan that is being served.")]
Folder = Annotated[Path | None, typer.Option("--out", help="The folder given to serve; default runs/<plan>-serve.")]
Prompts = Annotated[int, typer.Option("--prompts", min=0, metavar="N", help="Random prompts to compare.")]
NewTokens = Annotated[int, typer.Option("--tokens", min=2, metavar="N", help="New tokens of each.")]
Requests = Annotated[int, typer.Option("--requests", min=0, metavar="N", help="Of each load test; 0: none.")]
Clients = Annotated[int, typer.Option("--clients", min=1, max=1024, metavar="N", help="At once.")]
Seconds = Annotated[float, typer.Option("--seconds", min=1, metavar="S", help="No request starts later.")]
Rate = Annotated[float | None, typer.Option("--rate", metavar="R", help="Requests per second of an open loop.")]
Leave = Annotated[float, typer.Option("--leave", min=0, max=1, help="Share of clients that leave in mid-answer.")]


def check_serving(
    plan: PlanFile,
    weights: WeightsFolder = None,
    out: Folder = None,
    prompts: Prompts = 4,
    tokens: NewTokens = 24,
    requests: Requests = 64,
    clients: Clients = 32,
    seconds: Seconds = 60.0,
    rate: Rate = None,
    leave: Leave = 0.25,
    as_json: Json = False,
) -> int:
    """Compare a running server with unsharded transformers, its ranks with the layout, and load it.

    Start it with `meshwright serve PLAN` first. The load is a closed loop of --clients, then with --rate an open loop.
    """
    needs_runtime("check-serving")
    document = Plan.read(plan)
    if not isinstance(document.workload, ServingWorkload):
        raise InputError(f"{plan}: a plan for training; check-serving needs the one that is served")
    state = ServerState.read(out or Path("runs") / f"{Path(plan).stem}-serve")
    folder = weights or weights_folder(document) or Path(state.model)
    if not folder.is_dir():
        raise InputError(f"{folder}: no folder with the served weights; give --weights FOLDER")
    found: dict[str, Any] = {"url": state.url, "model": state.model}
    found["tokens"] = compare_tokens(state, folder, document, prompts, tokens)
    log = Path(state.log).read_text("utf-8", errors="replace")
    ranks, expected = reported_ranks(log, document.parallel), expected_ranks(document.parallel)
    alone = document.parallel.tp * document.parallel.pp == 1
    found["ranks_agree"] = ranks == expected or (alone and not ranks)
    loads = {"closed": None} | ({} if rate is None else {"open": rate})
    found["load"] = {
        kind: _load_document(
            run_load(state.url, _load_plan(state, document, requests, clients, seconds, leave, arrivals)), document
        )
        for kind, arrivals in loads.items()
        if requests
    }
    agrees = all(t["agrees"] for t in found["tokens"])
    calm = all(load["accounted_for"] for load in found["load"].values())
    found["agrees"] = bool(agrees and calm and found["ranks_agree"])
    if as_json:
        output.show_json(found)
    else:
        _show(found)
    return 0 if found["agrees"] else 1


def compare_tokens(state: ServerState, folder: Path, plan: Plan, prompts: int, tokens: int) -> list[dict[str, Any]]:
    """Served greedy tokens beside the reference's; at the first difference the gap of the two largest logits."""
    from meshwright.runtime.generation.reference import reference_answers

    draw = random.Random(7)
    vocabulary = min(plan.load_model().vocab, 256)
    length = _prompt_length(plan, tokens)
    asked = [[draw.randrange(vocabulary) for _ in range(max(1, length - 2 * i))] for i in range(prompts)]
    try:
        served = [complete(state.url, Completion(state.model, prompt, tokens)) for prompt in asked]
    except AnswerError as error:
        raise InputError(f"{state.url} does not answer: {error}") from None
    return [
        {"prompt": prompt, **compared_tokens(answer, reference)}
        for prompt, answer, reference in zip(asked, served, reference_answers(folder, asked, tokens), strict=True)
    ]


def compared_tokens(served: Sequence[int], reference: ReferenceAnswer) -> dict[str, Any]:
    """Both beside each other, the first place where they differ, and how sure the reference was there."""
    differs = next(
        (i for i, (a, b) in enumerate(zip(served, reference.tokens, strict=False)) if a != b),
        None if len(served) == len(reference.tokens) else min(len(served), len(reference.tokens)),
    )
    return {
        "served": list(served),
        "reference": list(reference.tokens),
        "agrees": differs is None,
        "first_difference": differs,
        "gap_there": None if differs is None or differs >= len(reference.gaps) else reference.gaps[differs],
        "smallest_gap": min(reference.gaps),
    }


def _prompt_length(plan: Plan, tokens: int) -> int:
    assert isinstance(plan.workload, ServingWorkload)
    longest = plan.workload.max_len or plan.workload.prompt + plan.workload.output
    if tokens >= longest:
        raise InputError(f"--tokens {tokens} leaves no room for a prompt: the plan serves {longest} tokens at most")
    return min(plan.workload.prompt, longest - tokens)


def _load_plan(
    state: ServerState, plan: Plan, requests: int, clients: int, seconds: float, leave: float, rate: float | None
) -> LoadPlan:
    assert isinstance(plan.workload, ServingWorkload)
    return LoadPlan(
        model=state.model,
        prompt_tokens=plan.workload.prompt,
        new_tokens=plan.workload.output,
        vocabulary=min(plan.load_model().vocab, 256),
        requests=requests,
        seconds=seconds,
        clients=clients,
        rate=rate,
        leave=leave,
    )


def _load_document(report: LoadReport, plan: Plan) -> dict[str, Any]:
    return {
        "asked": report.asked,
        "ends": report.ends,
        "accounted_for": report.accounted_for,
        "reasons": list(report.reasons),
        "seconds": report.seconds,
        "tokens_per_s": report.tokens_per_s,
        "ttft_s": report.ttft_s(),
        "tpot_s": report.tpot_s(),
        "predicted": _predicted(plan),
    }


def _predicted(plan: Plan) -> dict[str, float] | None:
    """The cost model's figures for the plan's cluster, if it names one."""
    if plan.cluster is None or not isinstance(plan.workload, ServingWorkload) or plan.workload.pool:
        return None
    from meshwright.cost.from_plan import serving_workload_of
    from meshwright.cost.serving import serve_estimate

    priced = serve_estimate(
        plan.load_model(), plan.load_cluster(), serving_workload_of(plan.workload), plan.parallel, plan.workload.batch
    )
    return {"ttft_s": priced.ttft_s, "tpot_s": priced.tpot_s, "tokens_per_s": priced.tokens_per_s}


def _show(found: dict[str, Any]) -> None:
    for number, compared in enumerate(found["tokens"], start=1):
        if compared["agrees"]:
            text = (
                f"prompt {number}: {len(compared['served'])} tokens equal; smallest gap {compared['smallest_gap']:.4f}"
            )
        else:
            gap = compared["gap_there"]
            text = (
                f"prompt {number}: DIFFERS at token {compared['first_difference']}, where the two largest logits are "
            )
            text += "unknown" if gap is None else f"{gap:.6f} apart"
        output.show(Text(text))
    output.show(Text(f"ranks are {'' if found['ranks_agree'] else 'NOT '}in the layout's vllm order"))
    for kind, load in found["load"].items():
        ends = ", ".join(f"{count} {end}" for end, count in load["ends"].items() if count)
        output.show(Text(f"{kind} loop: {load['asked']} requests in {load['seconds']:.1f} s: {ends}"))
        for name in ("ttft_s", "tpot_s"):
            values = "  ".join(f"p{p} {1e3 * v:.1f} ms" for p, v in load[name].items())
            predicted = load["predicted"]
            beside = f"  (predicted {1e3 * predicted[name]:.1f} ms)" if predicted else ""
            output.show(Text(f"  {'first token' if name == 'ttft_s' else 'per token'}: {values}{beside}"))
        output.show(Text(f"  {load['tokens_per_s']:,.1f} tokens/s"))
    output.show(Text("everything agrees" if found["agrees"] else "NOT everything agrees", style="bold"))
