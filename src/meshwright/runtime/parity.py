"""Parity: the whole plan with all its ranks against one process with the plain Hugging Face model, in float64.

In: a parallel config and a transformers config (small enough to run here). Both sides get the same seeded weights and
batch; every gradient (unclipped), the loss, and every weight after a few optimizer steps are compared. Out: a
`ParityReport` with the worst relative difference, and if they differ, the parameter at which backward first diverges.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from meshwright.layout.config import HybridParallelConfig
from meshwright.runtime.engine import Engine, EngineOptions, build_engine
from meshwright.runtime.expert_parallel.balance import has_balance_loss
from meshwright.runtime.families import family_of
from meshwright.runtime.float64 import keep_float64, recompute_contexts
from meshwright.runtime.launch import Device, run_ranks
from meshwright.runtime.optimizer import OptimizerOptions, adamw
from meshwright.runtime.process_groups import ProcessGroupManager
from meshwright.runtime.state import LocalParameter
from meshwright.runtime.tensor_parallel.cross_entropy import IGNORED
from meshwright.runtime.weights import SeededWeights, meta_model, reference_model

TOLERANCE = 1e-10
STEPS = 3
OPTIMIZER = OptimizerOptions(learning_rate=1e-3, clip_norm=0.5, warmup_steps=2, total_steps=10)

Prepare = Callable[[Engine], None]
"""Called with each rank's engine before it runs: tests inject faults with it."""


@dataclass(frozen=True)
class ParityJob:
    """What is compared. `ignored_share` of the labels are not counted, unevenly over microbatches."""

    config: HybridParallelConfig
    model_config: Any
    seq: int
    seed: int = 0
    ignored_share: float = 0.1
    prepare: Prepare | None = None


@dataclass(frozen=True)
class Difference:
    """One parameter: largest absolute difference over the largest absolute value of the whole tensor."""

    parameter: str
    stage: int
    kind: str  # 'gradient' or 'weight'
    relative: float
    copies: str  # how tp holds it, for the diagnosis


@dataclass(frozen=True)
class ParityReport:
    """`worst_relative_difference` is over gradients and stepped weights; `parameters` counts the model's tensors."""

    passed: bool
    worst_relative_difference: float
    worst_gradient: float
    worst_weight: float
    loss: float
    loss_difference: float
    parameters: int
    not_compared: tuple[str, ...]
    first_divergent: Difference | None
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class RankReport:
    """What a rank found: its differences in the order in which backward reaches the parameters, what it covered."""

    loss: float
    step_losses: tuple[float, ...]
    differences: tuple[Difference, ...]
    covered: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Reference:
    """The plain model's losses; gradients and weights are in the safetensors files of `folder`."""

    loss: float
    step_losses: tuple[float, ...]


def compare(job: ParityJob, tolerance: float = TOLERANCE, timeout_s: float = 300.0) -> ParityReport:
    """Run both sides in forked processes on this machine and compare them."""
    meta_model(job.model_config)  # imports the model's code once, before the ranks fork
    with tempfile.TemporaryDirectory(prefix="meshwright-parity-") as folder:
        reference: Reference = run_ranks(1, _run_reference, job, Path(folder), timeout_s=timeout_s)[0]
        ranks: list[RankReport] = run_ranks(job.config.world_size, _run_rank, job, Path(folder), timeout_s=timeout_s)
        sizes = _tensor_sizes(Path(folder))
    return _report(reference, ranks, sizes, tolerance)


def global_batch(job: ParityJob) -> tuple[Tensor, Tensor]:
    """Random tokens and shifted labels [global_batch, seq]; some labels are ignored, more in some sequences."""
    generator = torch.Generator().manual_seed(job.seed)
    shape = (job.config.global_batch, job.seq + 1)
    tokens = torch.randint(0, int(job.model_config.vocab_size), shape, generator=generator)
    labels = tokens[:, 1:].clone()
    share = job.ignored_share * 2 * torch.rand((shape[0], 1), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < share] = IGNORED
    return tokens[:, :-1].contiguous(), labels


def _run_reference(job: ParityJob, folder: Path) -> Reference:
    model = reference_model(job.model_config, job.seed, torch.float64)
    tokens, labels = global_batch(job)
    named = dict(model.named_parameters())
    matrices = [p for p in named.values() if p.dim() >= 2]
    others = [p for p in named.values() if p.dim() < 2]
    optimizer = adamw(matrices, others, OPTIMIZER)
    losses: list[float] = []
    for step in range(STEPS):
        loss = _plain_loss(model, tokens, labels, job.config.micro_batch)
        loss.backward()
        losses.append(float(loss.detach()))
        if step == 0:
            save_file({n: p.grad.clone() for n, p in named.items() if p.grad is not None}, folder / "gradients")
        nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = OPTIMIZER.rate(step)
        optimizer.step()
        optimizer.zero_grad()
    save_file({n: p.detach().clone() for n, p in named.items()}, folder / "weights")
    return Reference(losses[0], tuple(losses))


def _plain_loss(model: nn.Module, tokens: Tensor, labels: Tensor, micro_batch: int) -> Tensor:
    """Mean over tokens, and the mean over microbatches of the model's own load-balancing loss where it has one."""
    config: Any = model.config
    balanced = has_balance_loss(config)
    with keep_float64():
        if not balanced:
            logits = model(tokens, use_cache=False).logits
            return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        outputs = [model(part, use_cache=False) for part in tokens.split(micro_batch)]
        logits = torch.cat([output.logits for output in outputs])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return loss + config.router_aux_loss_coef * torch.stack([output.aux_loss for output in outputs]).mean()


def _run_rank(job: ParityJob, folder: Path) -> RankReport:
    groups = ProcessGroupManager(job.config, Device("cpu", "gloo"))
    options = EngineOptions(
        seq=job.seq,
        optimizer=OPTIMIZER,
        dtype=torch.float64,
        forward_context=keep_float64,
        recompute_contexts=recompute_contexts,
    )
    source = SeededWeights(job.model_config, family_of(job.model_config), job.seed)
    engine = build_engine(job.config, job.model_config, groups, source, options)
    if job.prepare:
        job.prepare(engine)
    tokens, labels = global_batch(job)
    per_rank = job.config.global_batch // job.config.dp
    own = slice(groups.axis("dp").rank * per_rank, (groups.axis("dp").rank + 1) * per_rank)
    loss, _ = engine.gradients(tokens[own], labels[own])
    differences = _differences(engine, folder / "gradients", "gradient", lambda p: p.gradient)
    step_losses = tuple(engine.step(tokens[own], labels[own]).loss for _ in range(STEPS))
    differences += _differences(engine, folder / "weights", "weight", lambda p: p.local)
    covered = tuple((p.slice.name, p.local.numel()) for p in engine.parameters if engine.owns(p))
    return RankReport(loss, step_losses, tuple(differences), covered)


def _differences(
    engine: Engine, file: Path, kind: str, of: Callable[[LocalParameter], Tensor | None]
) -> list[Difference]:
    """Compare this rank's part of every parameter, last layer first (the order of backward)."""
    stage = engine.groups.axis("pp").rank
    found: list[Difference] = []
    with safe_open(file, framework="pt") as tensors:
        for parameter in reversed(engine.parameters):
            whole = tensors.get_tensor(parameter.slice.name)
            expected, got = parameter.of(whole), of(parameter)
            if expected.numel() == 0:
                continue
            largest = float(whole.abs().max()) or 1.0
            worst = float("nan") if got is None else float((got - expected).abs().max()) / largest
            found.append(Difference(parameter.slice.name, stage, kind, worst, _copies(parameter)))
    return found


def _copies(parameter: LocalParameter) -> str:
    if parameter.tied:
        return "tied to another stage"
    if parameter.unit == "expert":
        return "routed experts, split over ep" + (" and expert_tp" if parameter.slice.dim is not None else "")
    if parameter.slice.dim is None:
        return "replicated over tp" if parameter.slice.copies > 1 else "whole"
    return "split over tp, KV heads in copies" if parameter.slice.copies > 1 else "split over tp"


def _tensor_sizes(folder: Path) -> dict[str, int]:
    with safe_open(folder / "weights", framework="pt") as tensors:
        return {name: tensors.get_tensor(name).numel() for name in tensors.keys()}  # noqa: SIM118 - not a mapping


def _report(reference: Reference, ranks: list[RankReport], sizes: dict[str, int], tolerance: float) -> ParityReport:
    differences = [d for rank in ranks for d in rank.differences]
    # NaN compares as larger than anything
    worst = {
        kind: max((_nan_as_inf(d.relative) for d in differences if d.kind == kind), default=float("inf"))
        for kind in ("gradient", "weight")
    }
    pairs = list(zip(ranks[0].step_losses, reference.step_losses, strict=True))
    loss_difference = max(_nan_as_inf(abs(got - want) / abs(want)) for got, want in pairs)
    seen: dict[str, int] = dict.fromkeys(sizes, 0)
    for rank in ranks:
        for name, count in rank.covered:
            seen[name] += count
    missing = tuple(name for name, size in sizes.items() if seen[name] != size)
    overall = max(worst.values())
    return ParityReport(
        passed=overall <= tolerance and loss_difference <= tolerance and not missing,
        worst_relative_difference=overall,
        worst_gradient=worst["gradient"],
        worst_weight=worst["weight"],
        loss=ranks[0].loss,
        loss_difference=loss_difference,
        parameters=len(sizes) - len(missing),
        not_compared=missing,
        first_divergent=_first_divergent(ranks, tolerance),
        tolerance=tolerance,
    )


def _first_divergent(ranks: list[RankReport], tolerance: float) -> Difference | None:
    """The parameter at which backward first goes wrong: latest stage, last layer; gradients before weights."""
    for kind in ("gradient", "weight"):
        for rank in sorted(ranks, key=lambda r: -max((d.stage for d in r.differences), default=0)):
            for difference in rank.differences:
                if difference.kind == kind and not difference.relative <= tolerance:
                    return difference
    return None


def _nan_as_inf(value: float) -> float:
    return value if value == value else float("inf")
