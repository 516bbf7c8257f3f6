"""`doctor oom`: who holds how much memory, what was being allocated when it ran out, and what would make it fit.

In: a `Run` that a job left, or a plan alone. Out: `OomReport`: memory of every rank beside the prediction of its stage,
the allocation that failed, and cures as configs that the cost model has priced.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from meshwright.cost.estimate import Estimate
from meshwright.cost.evaluate import estimate
from meshwright.cost.from_plan import workload_of
from meshwright.cost.stack import Stack, stack_for
from meshwright.cost.workload import Optimizer, Workload
from meshwright.doctor.calibration import runtime_stack
from meshwright.doctor.cures import Cure, Question, cures
from meshwright.doctor.out_of_memory import Refusal, refusal_in, refusal_of_kill
from meshwright.doctor.run_records import RankRun, Run
from meshwright.errors import InputError
from meshwright.hardware import Cluster
from meshwright.hardware import load as load_cluster
from meshwright.layout.config import Precision
from meshwright.ledger import MemoryKind
from meshwright.models import ModelSpec
from meshwright.plan import Plan, TrainingWorkload

SAME_SIZE = 0.01
"""Relative difference within which a refused size is taken for a tensor of that size."""


@dataclass(frozen=True)
class RankBytes:
    """One rank's memory: what was seen (None: it left no record) and what its stage was predicted to need."""

    rank: int
    host: str
    coordinates: dict[str, int]
    allocated_bytes: int | None
    reserved_bytes: int | None
    peak_bytes: int | None
    by_kind: dict[str, int]
    predicted_bytes: int | None


@dataclass(frozen=True)
class OomEvent:
    """The allocation that failed: where in the step, and what tensor has that size (where one has)."""

    rank: int
    coordinates: dict[str, int]
    host: str
    refusal: Refusal
    step: int | None
    module: str | None
    action: str | None
    microbatch: int | None
    looks_like: str | None


@dataclass(frozen=True)
class OomReport:
    """`fits` is the model's verdict, of the memory seen where more was seen than predicted. `excess`: seen over
    predicted on the fullest rank (1 where no more was seen). `cures` is empty where nothing is to be cured."""

    plan: Plan
    question: Question
    predicted: Estimate
    ranks: tuple[RankBytes, ...]
    event: OomEvent | None
    fullest_stage: int
    excess: float
    fits: bool
    cures: tuple[Cure, ...]
    notes: tuple[str, ...] = ()

    def plan_of(self, cure: Cure) -> Plan:
        """The plan with a cure, ready to be written."""
        return self.plan.model_copy(update={"parallel": cure.config, "provenance": None})


def question_of(plan: Plan, cluster: Cluster | None, ours: bool = False) -> Question:
    """The plan in the cost model's terms; `ours`: it was run by this project's runtime, which trains in the plan's
    precision with fp32 masters."""
    if not isinstance(plan.workload, TrainingWorkload):
        raise InputError("this is a plan for serving; the doctor's oom and efficiency are for training")
    machine = cluster or plan.load_cluster()
    work = workload_of(plan.workload)
    if plan.workload.optimizer is None and plan.parallel.precision is Precision.FP32:
        work = replace(work, optimizer=Optimizer.ADAM_FP32)
    return Question(plan.load_model(), machine, work, plan.parallel, _stack(plan, machine, ours))


def _stack(plan: Plan, machine: Cluster, ours: bool) -> Stack:
    named = plan.workload.stack
    if ours or machine.accelerator.architecture == "cpu":
        return runtime_stack(machine.accelerator)
    return stack_for(named or "megatron-core")


def diagnose_plan(plan: Plan, cluster: Cluster | None = None) -> OomReport:
    """A plan that has not run: does it fit, and if not, what would."""
    question = question_of(plan, cluster)
    return _report(plan, question, (), None, ())


def diagnose_oom(run: Run, cluster: Cluster | None = None, plan: Plan | None = None) -> OomReport:
    """The memory of a run. The plan is the run's own unless one is given; the cluster the plan's, or the machine's."""
    found, question = question_of_run(run, cluster, plan)
    return _report(found, question, run.ranks, _event(run, question), run.notes)


def question_of_run(run: Run, cluster: Cluster | None, plan: Plan | None) -> tuple[Plan, Question]:
    """What was run, in the cost model's terms."""
    found = plan or run.plan
    if found is None:
        raise InputError(f"{run.folder}: its metrics hold no plan; give the plan that was run with --plan")
    if cluster is None and found.cluster is None:
        cluster = _cluster_seen(run, found)
    return found, question_of(found, cluster, ours=True)


def _cluster_seen(run: Run, plan: Plan) -> Cluster:
    """What can be known of the machine from the records: a CPU."""
    devices = {rank.memory.device for rank in run.ranks if rank.memory is not None}
    if devices <= {"cpu"}:
        return load_cluster("cpu", gpus=plan.parallel.world_size) if plan.parallel.world_size < 8 else _many(plan)
    raise InputError("the plan names no cluster; say what it ran on with --cluster, like --cluster h100-sxm")


def _many(plan: Plan) -> Cluster:
    return load_cluster("cpu", nodes=1, gpus_per_node=plan.parallel.world_size)


def _report(
    plan: Plan, question: Question, ranks: tuple[RankRun, ...], event: OomEvent | None, notes: tuple[str, ...]
) -> OomReport:
    predicted = estimate(question.model, question.cluster, question.workload, question.config, question.stack)
    stages = {stage.stage: stage.total_bytes for stage in predicted.memory.stages}
    reserved = question.cluster.reserved_bytes
    seen = tuple(rank_bytes(rank, stages, question.config.pp, reserved) for rank in ranks)
    excess = max((_excess(s) for s in seen), default=1.0)
    fits = predicted.memory.fits and event is None
    fits = fits and predicted.memory.peak.total_bytes * excess <= question.capacity_bytes
    if event is not None and excess == 1.0 and predicted.memory.fits:
        # it ran out although it should have fitted: what is predicted is too little by at least that much
        excess = max(1.0, question.capacity_bytes / predicted.memory.peak.total_bytes)
    asked = replace(question, excess=excess)
    full = max((s for s in seen if s.peak_bytes), key=lambda s: s.peak_bytes or 0, default=None)
    stage = predicted.memory.peak.stage if full is None else full.coordinates.get("pp", predicted.memory.peak.stage)
    found = () if fits else cures(asked)
    return OomReport(plan, asked, predicted, seen, event, stage, excess, fits, found, notes)


def _excess(rank: RankBytes) -> float:
    if rank.peak_bytes is None or not rank.predicted_bytes:
        return 1.0
    return max(1.0, rank.peak_bytes / rank.predicted_bytes)


def rank_bytes(rank: RankRun, stages: dict[int, int], pp: int, reserved_bytes: int) -> RankBytes:
    """What a rank held beside what its stage needs. On a CPU what the process held before it had a model is taken off,
    and what the cluster reserves for it added, so that both count the same."""
    memory = rank.memory
    stage = rank.coordinates.get("pp", 0)
    beside = 0 if memory is None or memory.device != "cpu" else reserved_bytes - memory.before_bytes
    # stages with equal contents appear once, under the first of them
    known = stages.get(stage, next((v for s, v in sorted(stages.items(), reverse=True) if s <= stage), None))
    return RankBytes(
        rank=rank.rank,
        host=rank.host,
        coordinates=rank.coordinates,
        allocated_bytes=None if memory is None else max(0, memory.allocated_bytes + beside),
        reserved_bytes=None if memory is None else memory.reserved_bytes,
        peak_bytes=None if memory is None else max(0, memory.peak_bytes + beside),
        by_kind={} if memory is None else _with_rest(memory.by_kind, memory.peak_bytes - memory.before_bytes),
        predicted_bytes=known if stage < pp else None,
    )


def _with_rest(by_kind: dict[str, int], peak: int) -> dict[str, int]:
    """What the peak holds beyond parameters, gradients and optimizer state."""
    rest = peak - sum(by_kind.values())
    return by_kind | ({MemoryKind.ACTIVATIONS.value: rest} if rest > 0 else {})


def _event(run: Run, question: Question) -> OomEvent | None:
    """The first failure that is about memory: what a rank said itself, else the kernel's kill."""
    for rank in run.ranks:
        failure = rank.failure
        refusal = None if failure is None else refusal_in(failure.type, failure.message)
        if failure is not None and refusal is not None:
            looks = None if not refusal.requested_bytes else tensor_of(refusal.requested_bytes, question)
            return OomEvent(
                rank.rank, rank.coordinates, rank.host, refusal, failure.step, failure.module, failure.action,
                failure.microbatch, looks,
            )  # fmt: skip
    if run.launcher is None:
        return None
    refusal = refusal_of_kill(run.launcher) or refusal_in("", run.launcher.reason)
    if refusal is None:
        return None
    killed = next((r for r in run.ranks if run.launcher and r.rank == run.launcher.rank), None)
    coordinates, host = ({}, "?") if killed is None else (killed.coordinates, killed.host)
    step = None if killed is None or not killed.steps else killed.steps[-1].step + 1
    return OomEvent(run.launcher.rank, coordinates, host, refusal, step, None, None, None, None)


def tensor_of(nbytes: int, question: Question) -> str | None:
    """A tensor of the step that has this size: '[micro batch 4, seq 8192, vocab 128256] in fp32'."""
    config, model, work = question.config, question.model, question.workload
    batch, seq = config.micro_batch, work.seq // config.cp
    for words, elements in _tensors(model, work, config.tp, batch, seq):
        for name, size in (("fp32", 4), ("16 bits", 2)):
            if abs(elements * size - nbytes) <= SAME_SIZE * nbytes:
                return f"{words} in {name}"
    return None


def _tensors(model: ModelSpec, work: Workload, tp: int, batch: int, seq: int) -> list[tuple[str, float]]:
    vocab = -(-model.vocab // tp)
    found = [
        (f"logits [{batch}, {seq}, {vocab}]", float(batch * seq * vocab)),
        (f"hidden states [{batch}, {seq}, {model.hidden}]", float(batch * seq * model.hidden)),
    ]
    for kind in model.kinds:
        width = getattr(kind.mlp, "width", 0)
        heads = getattr(kind.mixer, "heads", 0)
        if width:
            found.append((f"an MLP's inner state [{batch}, {seq}, {width // tp}]", float(batch * seq * (width // tp))))
        if heads:
            scores = batch * (heads // tp) * seq * work.seq
            found.append((f"attention scores [{batch}, {heads // tp}, {seq}, {work.seq}]", float(scores)))
    return found
