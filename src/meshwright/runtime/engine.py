"""The training engine of one rank: chunks, schedule, data parallelism and optimizer put together for a plan.

In: a HybridParallelConfig, a transformers config and a weight source, on every rank of the world. Out: `Engine.step`
takes this dp rank's sequences and returns loss, gradient norm and token count of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from meshwright.errors import InputError
from meshwright.layout.config import HybridParallelConfig, Precision, Recompute
from meshwright.layout.split import layer_ranges
from meshwright.ledger import Phase
from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.context_parallel import ContextShard, refuse_dropout
from meshwright.runtime.data_parallel import PlainDataParallel
from meshwright.runtime.dropout import DropoutState
from meshwright.runtime.expert_parallel import ExpertAxes, ExpertOptions, ExpertParallelMoE, ExpertRegion, Routing
from meshwright.runtime.expert_parallel.balance import RouterBalance, has_balance_loss
from meshwright.runtime.expert_parallel.load import RouterLoad, router_load
from meshwright.runtime.expert_parallel.module import Load
from meshwright.runtime.families import expert_count, family_of
from meshwright.runtime.gradients import clip, complete_gradients, global_norm, gradient_of, scale_expert_gradients
from meshwright.runtime.optimizer import LocalOptimizer, LossScaler, OptimizerOptions
from meshwright.runtime.parallelize import Splitter, split_groups
from meshwright.runtime.pipeline import ActivationShape, Microbatch, PipelineExecutor
from meshwright.runtime.process_groups import ProcessGroupManager
from meshwright.runtime.recompute import Contexts, no_contexts
from meshwright.runtime.sharded import ShardedDataParallel, shard_chunk, shard_dim
from meshwright.runtime.slices import chunk_bounds
from meshwright.runtime.stage import ChunkPlan, Stage, StageModule, StageOptions, build_stage
from meshwright.runtime.state import LocalParameter, local_tensor, master_copy
from meshwright.runtime.tensor_parallel.cross_entropy import IGNORED
from meshwright.runtime.tensor_parallel.region import TensorParallelRegion
from meshwright.runtime.weights import WeightSource
from meshwright.schedules.actions import PipelineSchedule
from meshwright.schedules.builders import build
from meshwright.schedules.communication import with_communication

COMPUTE_DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}
LOSS_AND_TOKENS = "loss and token count"
LOSS = "loss"
TOKENS = "token count"


@dataclass(frozen=True)
class EngineOptions:
    """What a plan does not say. `dtype` overrides the plan's precision (parity runs in float64).

    `routing` balanced takes the place of the experts that the model's router chose (for tracing); `capacity_factor`
    limits the rows per expert (None: no token is dropped). `seed` is that of dropout. `forward_context` is entered
    around every forward pass; `recompute_contexts` around recomputation, `sharding_context` around the set-up of FSDP2
    (it reads the mesh, which a dry run must not fake).
    """

    seq: int
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    dtype: torch.dtype | None = None
    attention: str = "sdpa"
    routing: Routing = Routing.MODEL
    capacity_factor: float | None = None
    seed: int = 0
    forward_context: Callable[[], AbstractContextManager[object]] = nullcontext
    recompute_contexts: Contexts = no_contexts
    sharding_context: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class StepResult:
    """Figures of one step over the global batch; `loss` is the mean over its tokens. `skipped`: fp16 overflow."""

    loss: float
    gradient_norm: float
    tokens: int
    learning_rate: float
    skipped: bool = False


@dataclass
class Engine:
    """One rank of a training job. Build with `build_engine`."""

    config: HybridParallelConfig
    groups: ProcessGroupManager
    chunks: dict[int, StageModule]
    parameters: list[LocalParameter]
    data_parallel: PlainDataParallel | ShardedDataParallel
    executor: PipelineExecutor
    evaluator: PipelineExecutor
    optimizer: LocalOptimizer
    options: EngineOptions
    scaler: LossScaler | None
    context: ContextShard | None = None
    steps_done: int = field(default=0)

    @property
    def sharded(self) -> bool:
        return isinstance(self.data_parallel, ShardedDataParallel)

    def owns(self, parameter: LocalParameter) -> bool:
        """Whether this rank's copy stands for the model's: every element of it has exactly one owner."""
        if parameter.unit == "expert":
            first_replica = self.groups.axis("expert_replica" if self.sharded else "expert_dp").is_first
        else:
            first_replica = self.groups.axis("zero_replica" if self.sharded else "dp_cp").is_first
        return parameter.counts_in_norm and first_replica and not parameter.second_copy

    def holds_first_copy(self, second: LocalParameter) -> bool:
        """Whether this rank also holds the tied embeddings that `second` is a copy of."""
        return any(p.tied and not p.second_copy and p.slice.name == second.slice.name for p in self.parameters)

    def copy_second_copies(self) -> None:
        """After the first copy of tied embeddings was read from outside: make a second one on this rank equal."""
        first = next((p for p in self.parameters if p.tied and not p.second_copy), None)
        for second in (p for p in self.parameters if p.second_copy):
            if first is not None:
                self.optimizer.copy_state(first, second)

    @property
    def _loss_scale(self) -> float:
        return self.scaler.scale if self.scaler else 1.0

    @property
    def mixtures(self) -> dict[int, ExpertParallelMoE]:
        """Expert layers of this rank by their index in the model."""
        found: dict[int, ExpertParallelMoE] = {}
        for module in self.chunks.values():
            for index, layer in module.layers.items():
                found |= {int(index): part for part in layer.modules() if isinstance(part, ExpertParallelMoE)}
        return found

    def router_load(self) -> RouterLoad | None:
        """How the last step's tokens fell on experts and ranks (None: the model has none). On all ranks together."""
        module = next(iter(self.chunks.values()))
        experts = expert_count(module.config, module.family)
        if not experts:
            return None
        layers = int(module.config.num_hidden_layers)
        return router_load(self.mixtures, layers, experts, self.groups.device.torch)

    def step(self, tokens: Tensor, labels: Tensor) -> StepResult:
        """Train on this dp rank's sequences [global_batch / dp, seq]; labels are shifted already, -100 is ignored."""
        loss, count = self.gradients(tokens, labels)
        scale = self._loss_scale
        norm = global_norm(self.parameters, self.groups, self.sharded) / scale
        self.groups.recorder.begins("optimizer")
        accepted = self.scaler.update(float(norm)) if self.scaler else True
        rate = self.optimizer.options.rate(self.steps_done)
        if accepted:
            if scale != 1.0:
                self._scale_gradients(1.0 / scale)
            limit = self.optimizer.options.clip_norm
            if limit is not None:
                clip(self.parameters, norm, limit)
            rate = self.optimizer.step(self.steps_done)
        self.steps_done += 1
        return StepResult(loss, float(norm), count, rate, skipped=not accepted)

    def gradients(self, tokens: Tensor, labels: Tensor) -> tuple[float, int]:
        """Forward and backward of the global batch: complete, unclipped gradients, the mean loss, the token count."""
        self.data_parallel.begin()
        for module in self.chunks.values():
            module.dropout.step = self.steps_done
        for mixture in self.mixtures.values():
            mixture.load = Load()
        # Gradients are averaged over dp x cp, so each replica scales by its own share of the nominal tokens. Ignored
        # labels make the true count smaller: it is known only after the step's one exchange, which corrects for it.
        nominal = tokens.numel() * self.config.dp
        own = nominal / (self.config.dp * self.config.cp)
        tokens, labels = self._own_tokens(tokens, labels)
        self._weigh_balance_loss(labels)
        summed = self.executor.run(list(self._microbatches(tokens, labels)), self._loss_scale / own)
        self.data_parallel.finish()
        scale_expert_gradients(self.parameters, self.groups)
        complete_gradients(self.parameters, self.groups)
        loss, count = self._global_loss(summed, labels)
        if count != nominal:
            self._scale_gradients(nominal / max(1, count))
        return loss, count

    def evaluate(self, tokens: Tensor, labels: Tensor) -> float:
        """Mean loss of a global batch, forward only: no gradients, and no activation is kept."""
        tokens, labels = self._own_tokens(tokens, labels)
        self._weigh_balance_loss(labels)
        summed = self.evaluator.run(list(self._microbatches(tokens, labels)))
        return self._global_loss(summed, labels)[0]

    def _microbatches(self, tokens: Tensor, labels: Tensor) -> Iterator[Microbatch]:
        size = self.config.micro_batch
        expected = (self.config.num_microbatches * size, self.options.seq // self.config.cp)
        if tuple(tokens.shape) != expected or tuple(labels.shape) != expected:
            raise InputError(f"this dp rank's batch must be {list(expected)} tokens, got {list(tokens.shape)}")
        for start in range(0, expected[0], size):
            sequence = self.groups.axis("dp").rank * expected[0] + start
            yield Microbatch(tokens[start : start + size], labels[start : start + size], sequence)

    def _own_tokens(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """This cp rank's part of every sequence."""
        if self.context is None:
            return tokens, labels
        return self.context.own(tokens), self.context.own(labels)

    def _weigh_balance_loss(self, labels: Tensor) -> None:
        """The load-balancing loss is a mean over microbatches beside a mean over tokens: their number must be known."""
        balanced = [module.balance for module in self.chunks.values() if module.balance is not None]
        if balanced:
            count = (labels != IGNORED).sum().double()
            all_reduce(count, self.groups.axis("dp_cp"), TOKENS)
            for balance in balanced:
                balance.weight = float(count) / (self.config.dp * self.config.num_microbatches)

    def _global_loss(self, summed: Tensor | None, labels: Tensor) -> tuple[float, int]:
        """Mean loss and token count of the global batch: one exchange over dp, one to tell the other stages."""
        device = self.groups.device.torch
        both = torch.zeros(2, dtype=torch.float64, device=device)
        both[1] = (labels != IGNORED).sum()
        if summed is not None:
            both[0] = summed
        with self.groups.recorder.during(Phase.FORWARD):
            all_reduce(both, self.groups.axis("dp_cp"), LOSS_AND_TOKENS)
            total = both[0].clone()
            all_reduce(total, self.groups.axis("pp"), LOSS)
        count = int(both[1])
        return float(total) / max(1, count), count

    def _scale_gradients(self, factor: float) -> None:
        for parameter in self.parameters:
            gradient_of(parameter).mul_(factor)


def build_engine(
    config: HybridParallelConfig,
    model_config: Any,
    groups: ProcessGroupManager,
    source: WeightSource,
    options: EngineOptions,
) -> Engine:
    """Cut, split, fill and shard this rank's chunks, and make them ready to train."""
    _refuse_unsupported(config, model_config, options)
    if config.cp > 1:
        refuse_dropout(model_config)
    if family_of(model_config).attention_function and (config.cp > 1 or config.recompute is Recompute.SELECTIVE):
        raise InputError(
            f"model type '{model_config.model_type}' has attention of its own (sinks): use cp=1, recompute none or full"
        )
    split_groups(groups, model_config)
    schedule = pipeline_schedule(config)
    compute = options.dtype or COMPUTE_DTYPES[config.precision]
    shards = config.zero > 0 and groups.axis("zero_shard").size > 1
    stored = torch.float32 if shards and compute in (torch.bfloat16, torch.float16) else compute
    context = ContextShard(groups.axis("cp"), options.seq, config.cp_variant) if config.cp > 1 else None
    # ZeRO stores weights in fp32 and narrows what it gathers; replicas store them narrow, beside masters
    masters = not shards
    stages = build_chunks(config, model_config, groups, source, options, schedule, stored, context, masters)
    chunks = {chunk: stage.module for chunk, stage in stages.items()}
    if has_balance_loss(model_config):
        for module in chunks.values():
            module.watch_routers(_router_balance(model_config, groups))
    if shards:
        with options.sharding_context():
            for module in chunks.values():
                shard_chunk(module, groups, config.zero, None if stored == compute else compute)
    local = _local_parameters(stages, groups, shards)
    data_parallel = (
        ShardedDataParallel(local, chunks, config.zero)
        if shards
        else PlainDataParallel(local, groups.axis("dp_cp"), groups.axis("expert_dp"))
    )
    if isinstance(data_parallel, PlainDataParallel):
        for module in chunks.values():
            module.accumulate_products(data_parallel)
    activation = activation_shape(config, model_config, options.seq, compute, groups.device.torch)
    executor, evaluator = (
        PipelineExecutor(order, chunks, groups.axis("pp"), activation, data_parallel, options.forward_context)
        for order in (schedule, pipeline_schedule(config, forward_only=True))
    )
    optimizer = LocalOptimizer(local, options.optimizer)
    scaler = LossScaler() if compute == torch.float16 else None
    return Engine(
        config, groups, chunks, local, data_parallel, executor, evaluator, optimizer, options, scaler, context
    )


def _router_balance(model_config: Any, groups: ProcessGroupManager) -> RouterBalance:
    return RouterBalance(
        expert_count(model_config, family_of(model_config)),
        int(model_config.num_experts_per_tok),
        float(model_config.router_aux_loss_coef),
        groups.axis("tp_cp"),
        groups.axis("cp").size,
        groups.device.torch,
    )


def pipeline_schedule(config: HybridParallelConfig, forward_only: bool = False) -> PipelineSchedule:
    """The plan's schedule with its messages."""
    built = build(config.schedule, config.pp, config.num_microbatches, config.vpp, forward_only)
    return with_communication(built)


def activation_shape(
    config: HybridParallelConfig, model_config: Any, seq: int, dtype: torch.dtype, device: torch.device
) -> ActivationShape:
    shards = config.cp * (config.tp if config.sequence_parallel else 1)
    return ActivationShape((config.micro_batch, seq // shards, int(model_config.hidden_size)), dtype, device)


def _refuse_unsupported(config: HybridParallelConfig, model_config: Any, options: EngineOptions) -> None:
    if config.num_microbatches < 1 or config.global_batch % (config.dp * config.micro_batch):
        raise InputError(
            f"global_batch={config.global_batch} is not a multiple of dp x micro_batch = "
            f"{config.dp * config.micro_batch}"
        )
    if config.sequence_parallel and options.seq // config.cp % config.tp:
        raise InputError(f"sequence parallelism needs tp={config.tp} to divide the sequence of {options.seq} tokens")
    experts = expert_count(model_config, family_of(model_config))
    if not experts and config.ep * config.expert_tp > 1:
        raise InputError(
            f"the model has no experts: use ep=1, expert_tp=1 (got ep={config.ep}, expert_tp={config.expert_tp})"
        )
    tokens = config.micro_batch * (options.seq // config.cp)
    if experts and tokens % config.tp:
        raise InputError(f"tp={config.tp} must divide the {tokens} tokens of a microbatch that experts share")
    if options.dtype is None and config.precision not in COMPUTE_DTYPES:
        known = ", ".join(COMPUTE_DTYPES)
        raise InputError(f"precision {config.precision} cannot be trained here; use one of {known}")


def build_chunks(
    config: HybridParallelConfig,
    model_config: Any,
    groups: ProcessGroupManager,
    source: WeightSource,
    options: EngineOptions,
    schedule: PipelineSchedule,
    stored: torch.dtype,
    context: ContextShard | None,
    masters: bool = False,
) -> dict[int, Stage]:
    """This rank's chunks, cut, split and filled. `masters`: see StageOptions."""
    region = TensorParallelRegion(groups.axis("tp"), config.sequence_parallel and config.tp > 1)
    axes = ExpertAxes(groups.axis("ep"), groups.axis("expert_tp"))
    experts = ExpertRegion(axes, region, ExpertOptions(options.routing, options.capacity_factor))
    splitter = Splitter(family_of(model_config), model_config, region, experts)
    stage_options = StageOptions(
        stored,
        groups.device.torch,
        config.recompute,
        config.recompute_every,
        options.recompute_contexts,
        options.attention,
        DropoutState(options.seed),
        context,
        masters,
    )
    tp_mesh = groups.mesh["tp"] if config.tp > 1 else None
    ranges = layer_ranges(config, int(model_config.num_hidden_layers))
    stages: dict[int, Stage] = {}
    for chunk in schedule.chunks_of(groups.axis("pp").rank):
        plan = ChunkPlan(ranges[chunk], chunk == 0, chunk == len(ranges) - 1)
        stages[chunk] = build_stage(plan, splitter, source, stage_options, tp_mesh)
    return stages


def _local_parameters(stages: dict[int, Stage], groups: ProcessGroupManager, shards: bool) -> list[LocalParameter]:
    local: list[LocalParameter] = []
    for chunk, stage in stages.items():
        module = stage.module
        tied = module.tied_weight_name()
        for name, live in module.named_parameters():
            assert isinstance(live, torch.nn.Parameter)
            piece = stage.slices[name]
            unit = "layer" if name.startswith(f"{module.family.base}.{module.family.layers}.") else "ends"
            unit = unit if piece.experts is None else "expert"
            shape, dim, rows = piece.local_shape, 0, (0, 0)
            shard = groups.axis("expert_shard" if unit == "expert" else "zero_shard")
            if shape:
                dim = shard_dim(shape, shard.size, unit == "expert") if shards else 0
                rows = chunk_bounds(shape[dim], shard.rank, shard.size) if shards else (0, shape[dim])
            precise = stage.masters.get(name)
            master = master_copy(local_tensor(live)) if precise is None else precise
            local.append(LocalParameter(name, chunk, unit, live, piece, rows, master, tied=name == tied, shard_dim=dim))
    return local
