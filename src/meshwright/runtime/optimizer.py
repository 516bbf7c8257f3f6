"""AdamW over local tensors, a learning rate with warm-up and cosine decay, and loss scaling for fp16.

The optimizer sees each rank's local masters as plain tensors, so a step costs no DTensor dispatch. Weight decay applies
to matrices only (judged by the whole tensor's shape), as is usual for norms and biases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meshwright.runtime.gradients import gradient_of
from meshwright.runtime.state import LocalParameter


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW (Loshchilov & Hutter 2019) and its learning-rate course. `total_steps` None: constant after warm-up."""

    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    warmup_steps: int = 0
    total_steps: int | None = None
    final_fraction: float = 0.1

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: linear warm-up, then cosine down to `final_fraction` of the peak."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.total_steps is None:
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        return self.learning_rate * (self.final_fraction + (1.0 - self.final_fraction) * cosine)


def adamw(matrices: Sequence[Tensor], others: Sequence[Tensor], options: OptimizerOptions) -> torch.optim.AdamW:
    """AdamW that decays `matrices` and leaves `others` alone."""
    groups = [
        {"params": list(tensors), "weight_decay": decay}
        for tensors, decay in ((matrices, options.weight_decay), (others, 0.0))
        if tensors
    ]
    return torch.optim.AdamW(groups, options.learning_rate, options.betas, options.epsilon, fused=True)


class LocalOptimizer:
    """AdamW over the masters of a rank's local parameters."""

    def __init__(self, parameters: Sequence[LocalParameter], options: OptimizerOptions) -> None:
        self.options = options
        self.parameters = list(parameters)
        self.leaves = [nn.Parameter(p.master) for p in parameters]  # alias the masters' storage
        matrices = [leaf for leaf, p in zip(self.leaves, parameters, strict=True) if len(p.slice.shape) >= 2]
        others = [leaf for leaf, p in zip(self.leaves, parameters, strict=True) if len(p.slice.shape) < 2]
        self.adamw = adamw(matrices, others, options)

    @property
    def steps_taken(self) -> int:
        """Steps that changed the weights (fp16 may have skipped some)."""
        counts = [int(state["step"]) for state in self.adamw.state.values()]
        return counts[0] if counts else 0

    def create_state(self) -> None:
        """The state that AdamW makes in its first step, where it is not there yet."""
        for leaf in self.leaves:
            if not self.adamw.state[leaf]:
                self.adamw.state[leaf] = {
                    "step": torch.zeros((), dtype=torch.float32, device=leaf.device),
                    "exp_avg": torch.zeros_like(leaf),
                    "exp_avg_sq": torch.zeros_like(leaf),
                }

    def restored(self, steps_taken: int) -> None:
        """Masters and state were overwritten from a checkpoint."""
        for leaf, parameter in zip(self.leaves, self.parameters, strict=True):
            self.adamw.state[leaf]["step"].fill_(steps_taken)
            parameter.write_back()

    def copy_state(self, source: LocalParameter, target: LocalParameter) -> None:
        """Make master and state of one parameter those of another of its shape."""
        leaves = {id(p): leaf for p, leaf in zip(self.parameters, self.leaves, strict=True)}
        own, other = leaves[id(target)], leaves[id(source)]
        with torch.no_grad():
            own.copy_(other)
            for name in ("exp_avg", "exp_avg_sq"):
                self.adamw.state[own][name].copy_(self.adamw.state[other][name])
        target.write_back()

    def step(self, index: int) -> float:
        """Step number `index` with the gradients as they are; returns the learning rate used."""
        rate = self.options.rate(index)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        for leaf, parameter in zip(self.leaves, self.parameters, strict=True):
            leaf.grad = gradient_of(parameter).to(leaf.dtype)
        self.adamw.step()
        for leaf, parameter in zip(self.leaves, self.parameters, strict=True):
            leaf.grad = None
            parameter.write_back()
        return rate


class LossScaler:
    """Dynamic loss scale for fp16 (Micikevicius et al. 2018): halved when gradients overflow, doubled after
    `patience` good steps. All ranks see the same global norm, so they decide alike."""

    def __init__(self, scale: float = 2.0**16, patience: int = 1000) -> None:
        self.scale = scale
        self.patience = patience
        self.good_steps = 0

    def update(self, norm: float) -> bool:
        """Take note of a step's unscaled norm; False if the step must be skipped."""
        if not math.isfinite(norm):
            self.scale, self.good_steps = max(1.0, self.scale / 2), 0
            return False
        self.good_steps += 1
        if self.good_steps == self.patience:
            self.scale, self.good_steps = self.scale * 2, 0
        return True
