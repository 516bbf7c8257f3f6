"""One step of one configuration, simulated: `simulate_step(model, cluster, workload, config, stack) -> StepTimeline`.

The closed form of cost.step sums what a stage waits for; here the waits happen, or do not. What an axis exposes is
found by replaying the step without its messages.
"""

from __future__ import annotations

from math import log2

from meshwright.cost.blueprint import blueprint
from meshwright.cost.candidates import Candidates, unit_keys
from meshwright.cost.evaluate import machine_of
from meshwright.cost.exposed import LAYER_AXES
from meshwright.cost.memory import training_memory
from meshwright.cost.stack import Stack
from meshwright.cost.stages import stages
from meshwright.cost.stalls import stalled_seconds
from meshwright.cost.step import Machine, kernels_of, messages_of
from meshwright.cost.workload import Workload
from meshwright.errors import InputError
from meshwright.hardware.spec import Cluster
from meshwright.layout.config import HybridParallelConfig
from meshwright.models.spec import ModelSpec
from meshwright.schedules import build
from meshwright.simulation.replay import replay
from meshwright.simulation.timeline import Exposure, Span, StepTimeline, Stream
from meshwright.simulation.work import StepWork, silenced, step_work

MOST_ACTIONS = 1_000_000
STREAM_OF = {"tp": Stream.TP, "cp": Stream.CP, "ep": Stream.EP, "pp": Stream.SEND, "dp": Stream.DP}


def simulate_step(
    model: ModelSpec, cluster: Cluster, workload: Workload, config: HybridParallelConfig, stack: Stack | None = None
) -> StepTimeline:
    """Replay one step. A schedule of more than a million actions is refused."""
    microbatches = config.global_batch // (config.dp * config.micro_batch)
    actions = 3 * config.pp * config.vpp * microbatches
    if actions > MOST_ACTIONS:
        batch = max(1, MOST_ACTIONS * microbatches // actions) * config.dp * config.micro_batch
        raise InputError(
            f"a timeline of {microbatches:,} microbatches over {config.pp * config.vpp} chunks has too many actions; "
            f"give --global-batch {batch} or less"
        )
    machine = machine_of(cluster, stack)
    one = Candidates.from_configs([config])
    plan = blueprint(model, workload, one, machine.stack)
    kernels, messages = kernels_of(plan, machine), messages_of(plan, machine)
    schedule = build(config.schedule, config.pp, microbatches, config.vpp)

    def replayed(silent: str | None = None) -> tuple[StepWork, tuple[Span, ...]]:
        work = step_work(plan, machine, kernels, messages if silent is None else silenced(messages, silent))
        return work, replay(schedule, work)

    work, spans = replayed()
    whole = _end(spans)
    exposed: dict[str, Exposure] = {}
    for axis in (*LAYER_AXES, "pp", "dp"):
        wire = _wire_s(work, spans, axis, config, microbatches)
        if wire > 0:
            exposed[axis] = Exposure(wire, max(0.0, whole - _end(replayed(axis)[1])))
    tail = _tail_s(model, workload, machine, one, whole)
    return StepTimeline(config.pp, microbatches, spans, tail, exposed)


def _end(spans: tuple[Span, ...]) -> float:
    return max((span.end_s for span in spans), default=0.0)


def _wire_s(
    work: StepWork, spans: tuple[Span, ...], axis: str, config: HybridParallelConfig, microbatches: int
) -> float:
    """Seconds of an axis' messages on the stage that has most of them."""
    if axis == "dp" and config.zero >= 2:  # inside the passes: reductions (ZeRO-3: gathering too) of every microbatch
        return max(s.reduction_s * microbatches + s.gather_wire_s + s.final_s for s in work.stages)
    seconds = [0.0] * len(work.stages)
    for span in spans:
        if span.stream is STREAM_OF[axis]:
            seconds[span.stage] += span.end_s - span.start_s
    return max(seconds)


def _tail_s(model: ModelSpec, workload: Workload, machine: Machine, one: Candidates, replayed_s: float) -> float:
    """What every step costs beside its spans: fixed host time, stalls (cost.stalls), waiting for the slowest of the
    nodes (`step.assembled`)."""
    stack, cluster = machine.stack, machine.cluster
    tail = stack.step_host_s
    nodes = max(float(one.world[0]) / cluster.gpus_per_node, 1.0)
    tail += stack.straggler * log2(nodes) * (replayed_s + tail)
    if stack.stalls:
        held = training_memory(model, cluster, workload, one, stages(model, one), unit_keys(one), stack)
        tail += float(stalled_seconds(model, one, held.peak_bytes, cluster, stack)[0])
    return tail
