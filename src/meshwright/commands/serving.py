"""The serving side of `plan` and `estimate`: how to cut a model over GPUs that answer requests.

In: what the commands parsed. Out: an exit code, after one call and one print.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from meshwright.commands import output
from meshwright.commands.inputs import load_model, milliseconds, needed
from meshwright.commands.jobs import ClusterOptions, section_of
from meshwright.cost.from_plan import serving_workload_of
from meshwright.cost.serving import ServingEstimate, serve_estimate
from meshwright.cost.serving_stack import ServingStack, serving_stacks
from meshwright.cost.vllm_cache import predicted_cache
from meshwright.cost.workload import WEIGHT_FORMAT_BYTES, ServingWorkload
from meshwright.errors import InputError, suggestion
from meshwright.hardware import Cluster
from meshwright.layout.config import Precision
from meshwright.models import ModelSpec
from meshwright.plan import EstimateSummary, Plan
from meshwright.plan import ServingWorkload as ServingSection
from meshwright.planner.constraints import Constraints
from meshwright.planner.objectives import Objective
from meshwright.planner.serving import serving_search
from meshwright.planner.serving_format import stored_format
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


@dataclass(frozen=True)
class ServingQuestion:
    """What a search for ways to serve is asked. `precision` None: as the checkpoint stores its weights."""

    model: str
    cluster: ClusterOptions
    requests: Requests
    fixed: Constraints
    precision: Precision | None
    objective: Objective
    top: int
    engine: str | None


@dataclass(frozen=True)
class ServingJob:
    """The question with everything loaded and the format decided."""

    model: ModelSpec
    cluster: Cluster
    section: ServingSection
    workload: ServingWorkload
    fixed: Constraints
    stack: ServingStack

    @classmethod
    def of(cls, question: ServingQuestion) -> ServingJob:
        stack = load_engine(question.engine)
        section = question.requests.section(None if stack.name == DEFAULT_ENGINE else stack.name)
        model, cluster, fixed = load_model(question.model), question.cluster.load(), question.fixed
        if question.precision is None and section.weight_format is None:
            stored = stored_format(model, cluster.accelerator)
            fixed = replace(fixed, precision=stored.precision)
            section = section.model_copy(update={"weight_format": stored.weight_format})
        return cls(model, cluster, section, serving_workload_of(section), fixed, stack)

    @property
    def heading(self) -> str:
        return serving_line(self.model, self.cluster, self.workload, self.section.weight_format or self.fixed.precision)


def plan_serving(question: ServingQuestion, out: Path | None, plot: bool, as_json: bool) -> int:
    """Search the ways to serve, print them, write the best."""
    job = ServingJob.of(question)
    spec, machine, workload, section, objective = job.model, job.cluster, job.workload, job.section, question.objective
    found = serving_search(spec, machine, workload, objective, question.top, job.fixed, job.stack)
    if out is not None and found.best:
        best = found.best[0]
        summary = EstimateSummary(tokens_per_s_per_gpu=best.tokens_per_s_per_gpu)
        Plan.from_parts(
            question.model,
            best.config,
            _with_limit(section, best),
            section_of(question.cluster, machine),
            objective=objective.value,
            estimate=summary,
        ).write(out)
    if as_json:
        output.show_json(serving_document(spec, machine, workload, found))
    else:
        cache = predicted_cache(spec, machine, workload, found.best[0]) if found.best else None
        output.show(serving_report(job.heading, found, cache, plot))
    return 0 if found.best else 1


def _with_limit(section: ServingSection, best: ServingEstimate) -> ServingSection:
    """The section with the number of sequences that was priced, where that is less than memory has room for: an engine
    fills its cache unless it is told, and would miss the target."""
    if best.sequences >= best.max_sequences:
        return section
    return section.model_copy(update={"batch": best.sequences})


def estimate_serving(plan: Plan, section: ServingSection, as_json: bool) -> int:
    """One serving plan in full."""
    spec, machine, workload = plan.load_model(), plan.load_cluster(), serving_workload_of(section)
    if section.pool is not None:
        raise InputError(
            f"the plan is the {section.pool} pool of two, priced together by meshwright plan --serve --disaggregated"
        )
    priced: ServingEstimate = serve_estimate(
        spec, machine, workload, plan.parallel, section.batch, load_engine(section.stack)
    )
    if as_json:
        output.show_json(serving_estimate_document(priced, machine))
    else:
        heading = serving_line(spec, machine, workload, section.weight_format or plan.parallel.precision)
        output.show(serving_estimate_report(heading, priced, machine))
    return 0 if priced.fits else 1
