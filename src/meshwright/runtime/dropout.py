"""Dropout that no layout changes: every mask is drawn from the seed, the step, the sequence, the place in the model.

In: the modules of a stage. Out: the same modules with their dropout replaced: a mask of hidden states belongs to a
sequence (under sequence parallelism a rank draws all of it and keeps its tokens), one of attention to a sequence and a
head. No generator has a state to save: a resumed or recomputed pass draws the same masks again. Attention with dropout
is computed in the open (scores, softmax, mask), because fused kernels draw as they like; without it nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from meshwright.errors import InputError
from meshwright.runtime.recompute import Contexts
from meshwright.runtime.tensor_parallel.region import TensorParallelRegion
from meshwright.runtime.weights import seed_of

ATTENTION = "meshwright_dropout"
ATTENTION_SETTINGS = ("attention_dropout", "attn_pdrop")
"""What configs of transformers call the dropout of attention probabilities."""


@dataclass
class DropoutState:
    """Which pass is under way. `sequence`: the first of its microbatch, counted in the global batch; `active`: False in
    evaluation."""

    seed: int = 0
    step: int = 0
    sequence: int = 0
    active: bool = True

    def mask(self, place: str, share: float, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """True where values stay, [sequences, ...], each sequence drawn by itself."""
        generator = torch.Generator(device)
        drawn: list[Tensor] = []
        for index in range(shape[0]):
            generator.manual_seed(seed_of("dropout", self.seed, self.step, self.sequence + index, place))
            drawn.append(torch.rand(shape[1:], generator=generator, device=device) >= share)
        return torch.stack(drawn)

    @contextmanager
    def on(self, sequence: int, active: bool, step: int | None = None) -> Iterator[None]:
        """Inside, masks are those of the microbatch that begins with `sequence`."""
        before = (self.sequence, self.active, self.step)
        self.sequence, self.active, self.step = sequence, active, self.step if step is None else step
        try:
            yield
        finally:
            self.sequence, self.active, self.step = before

    def contexts(self, inner: Contexts) -> Contexts:
        """For recomputation: it happens in the backward pass, when another microbatch may be under way."""

        def make() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            forward, again = inner()
            stack = ExitStack()
            return forward, _Both(stack, (again, self.on(self.sequence, self.active, self.step)))

        return make


class _Both:
    """Several contexts as one."""

    def __init__(self, stack: ExitStack, contexts: tuple[AbstractContextManager[Any], ...]) -> None:
        self._stack = stack
        self._contexts = contexts

    def __enter__(self) -> None:
        for context in self._contexts:
            self._stack.enter_context(context)

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


class SequenceDropout(nn.Module):
    """In the place of nn.Dropout on hidden states [b, s or s/tp, h]."""

    def __init__(self, p: float, place: str, region: TensorParallelRegion, state: DropoutState) -> None:
        super().__init__()
        self.p = p
        self._place = place
        self._region = region
        self._state = state

    def forward(self, hidden: Tensor) -> Tensor:
        if not self._state.active:
            return hidden
        shards = self._region.axis.size if self._region.sequence_parallel else 1
        whole = (hidden.shape[0], hidden.shape[1] * shards, *hidden.shape[2:])
        stays = self._region.own_tokens(self._state.mask(self._place, self.p, whole, hidden.device))
        return hidden * stays / (1.0 - self.p)


def has_attention_dropout(config: Any) -> bool:
    return any(float(getattr(config, name, 0.0) or 0.0) > 0.0 for name in ATTENTION_SETTINGS)


def register_attention(core: str) -> str:
    """Register an attention function that is `core` without dropout; returns its name for transformers."""
    plain: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[core]

    def attend(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0, **keywords: Any
    ) -> tuple[Tensor, None]:
        place: AttentionPlace = module.dropout_place  # pyright: ignore[reportAssignmentType]
        if dropout == 0.0 or not place.state.active:
            return plain(module, q, k, v, mask, dropout=0.0, **keywords)
        probabilities = _probabilities(q, _per_head(k, q), mask, keywords.get("scaling"))
        kept = probabilities * place.mask(probabilities, dropout) / (1.0 - dropout)
        return (kept @ _per_head(v, q)).transpose(1, 2).contiguous(), None

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return ATTENTION


@dataclass(frozen=True)
class AttentionPlace:
    """An attention module's place in the model: its name, and which of all heads is its first here."""

    name: str
    tp_rank: int
    state: DropoutState

    def mask(self, probabilities: Tensor, share: float) -> Tensor:
        """[b, heads, s, s], each head drawn by itself."""
        batch, heads, *pairs = probabilities.shape
        first = self.tp_rank * heads
        drawn = [
            self.state.mask(f"{self.name}.{first + head}", share, (batch, *pairs), probabilities.device)
            for head in range(heads)
        ]
        return torch.stack(drawn, dim=1)


def refuse_parts_of_sequences(config: Any, stage: nn.Module) -> None:
    """Under context parallelism a rank holds pieces of a sequence, for which masks are not drawn."""
    if has_attention_dropout(config) or any(isinstance(m, SequenceDropout) for m in stage.modules()):
        raise InputError("a model with dropout cannot be trained with cp > 1; set its dropout to 0, or cp to 1")


def install(stage: nn.Module, attention: str, region: TensorParallelRegion, state: DropoutState) -> None:
    """Replace a stage's dropout in place. `attention`: the name of a layer's attention module."""
    for name, module in list(stage.named_modules()):
        if isinstance(module, nn.Dropout) and module.p > 0.0:
            parent, _, child = name.rpartition(".")
            setattr(stage.get_submodule(parent), child, SequenceDropout(module.p, name, region, state))
        elif name.endswith(f".{attention}"):
            module.dropout_place = AttentionPlace(name, region.axis.rank, state)  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]


def _per_head(kv: Tensor, q: Tensor) -> Tensor:
    """[b, KV heads, s, d] -> [b, heads, s, d]"""
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """[b, heads, s, s], causal where there is no mask; softmax in fp32 or wider."""
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype)
