"""The serving side of `plan` and `estimate`: how to cut a model over GPUs that answer requests.

In: what the commands parsed. Out: an exit code, after one call and one print.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from meshwright.commands import output
from meshwright.commands.inputs import load_model, milliseconds, needed
from meshwright.commands.jobs import ClusterOptions, section_of
from meshwright.cost.from_plan import serving_workload_of
from meshwright.cost.serving import ServingEstimate, serve_estimate
from meshwright.cost.serving_stack import ServingStack, serving_stacks
from meshwright.cost.vllm_cache import predicted_cache
from meshwright.cost.workload import WEIGHT_FORMAT_BYTES
from meshwright.errors import InputError, suggestion
from meshwright.plan import EstimateSummary, Plan
from meshwright.plan import ServingWorkload as ServingSection
from meshwright.planner.constraints import Constraints
from meshwright.planner.objectives import Objective
from meshwright.planner.serving import serving_search
from meshwright.report.headings import serving_line
from meshwright.report.serving_tables import (
    serving_document,
    serving_estimate_document,
    serving_estimate_report,
    serving_report,
)

DEFAULT_ENGINE = "vllm"
KV_BYTES = {"bf16": 2.0, "fp8": 1.0}


@dataclass(frozen=True)
class Requests:
    """--prompt, --output and the targets, as given."""

    prompt: int | None
    output: int | None
    ttft_ms: float | None
    tpot_ms: float | None
    kv_format: str | None = None
    weight_format: str | None = None
    prefix_hit_rate: float | None = None
    pass_tokens: int | None = None

    def refuse_without_serve(self) -> None:
        """These options mean nothing for training."""
        for option, value in (("--prompt", self.prompt), ("--output", self.output), ("--ttft-ms", self.ttft_ms),
                              ("--tpot-ms", self.tpot_ms), ("--kv-format", self.kv_format),
                              ("--weight-format", self.weight_format), ("--pass-tokens", self.pass_tokens),
                              ("--prefix-hit-rate", self.prefix_hit_rate)):  # fmt: skip
            if value is not None:
                raise InputError(f"{option} is about serving: give --serve too")

    def section(self, engine: str | None) -> ServingSection:
        """The same as a section of a plan: what is planned is what is written."""
        rate = self.prefix_hit_rate
        if rate is not None and not 0.0 <= rate < 1.0:
            raise InputError(f"--prefix-hit-rate {rate:g} is no share; give 0 to below 1, like 0.5")
        kv_bytes = None if self.kv_format is None else KV_BYTES[_choice("--kv-format", self.kv_format, KV_BYTES)]
        weights = self.weight_format
        return ServingSection.model_validate({
            "kind": "serving",
            "prompt": needed("--prompt", self.prompt, 1024),
            "output": needed("--output", self.output, 256),
            "ttft_s": milliseconds("--ttft-ms", self.ttft_ms),
            "tpot_s": milliseconds("--tpot-ms", self.tpot_ms),
            "kv_bytes_per_element": kv_bytes,
            "weight_format": None if weights is None else _choice("--weight-format", weights, WEIGHT_FORMAT_BYTES),
            "prefix_hit_rate": rate,
            "pass_tokens": self.pass_tokens,
            "stack": engine,
        })  # fmt: skip


def _choice(option: str, given: str, known: Mapping[str, float]) -> str:
    if given.lower() not in known:
        raise InputError(f"{option} {given!r}: use one of {', '.join(known)}")
    return given.lower()


def refuse_training_options(given: Mapping[str, object]) -> None:
    """Options that only a training step has."""
    for option, value in given.items():
        if value is not None:
            raise InputError(f"{option} is about training: leave it out with --serve")


def load_engine(name: str | None) -> ServingStack:
    """The serving engine of an exact name; vLLM where none is given."""
    known = serving_stacks()
    key = (name or DEFAULT_ENGINE).lower()
    if key not in known:
        hint = suggestion(key, known) or f"; known: {', '.join(known)}"
        raise InputError(f"unknown serving engine {name!r}{hint}")
    return known[key]


def plan_serving(
    model: str,
    cluster: ClusterOptions,
    requests: Requests,
    fixed: Constraints,
    objective: Objective,
    top: int,
    engine: str | None,
    out: Path | None,
    plot: bool,
    as_json: bool,
) -> int:
    """Search the ways to serve, print them, write the best."""
    stack = load_engine(engine)
    section = requests.section(None if stack.name == DEFAULT_ENGINE else stack.name)
    spec, machine, workload = load_model(model), cluster.load(), serving_workload_of(section)
    found = serving_search(spec, machine, workload, objective, top, fixed, stack)
    if out is not None and found.best:
        best = found.best[0]
        summary = EstimateSummary(tokens_per_s_per_gpu=best.tokens_per_s_per_gpu)
        Plan.from_parts(
            model, best.config, section, section_of(cluster, machine), objective=objective.value, estimate=summary
        ).write(out)
    if as_json:
        output.show_json(serving_document(spec, machine, workload, found))
    else:
        cache = predicted_cache(spec, machine, workload, found.best[0]) if found.best else None
        output.show(serving_report(serving_line(spec, machine, workload), found, cache, plot))
    return 0 if found.best else 1


def estimate_serving(plan: Plan, section: ServingSection, as_json: bool) -> int:
    """One serving plan in full."""
    spec, machine, workload = plan.load_model(), plan.load_cluster(), serving_workload_of(section)
    priced: ServingEstimate = serve_estimate(
        spec, machine, workload, plan.parallel, section.batch, load_engine(section.stack)
    )
    if as_json:
        output.show_json(serving_estimate_document(priced, machine))
    else:
        output.show(serving_estimate_report(serving_line(spec, machine, workload), priced, machine))
    return 0 if priced.fits else 1
