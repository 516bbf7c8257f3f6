"""Batches on their way through the stages: several in flight, so that a stage works on one while another is elsewhere.

In: this rank's stage and the batches of its replica. Out: the new tokens of every batch, on every rank of the replica.
All stages take the batches in one order: a turn of a batch is its prompt or one token per sequence. The last stage
chooses the tokens and tells all stages, so that each knows by itself when a batch has ended and the next may begin.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.ledger import Collective
from meshwright.runtime.collectives import tensor_bytes
from meshwright.runtime.generation.forward import forward_cached
from meshwright.runtime.generation.kv_cache import KVCache
from meshwright.runtime.generation.sampler import Sampling, next_tokens
from meshwright.runtime.process_groups import AxisGroup
from meshwright.runtime.stage import StageModule

HIDDEN, TOKENS = "hidden states", "new tokens"
FILLER = -1


@dataclass
class Batch:
    """Prompts that are read and continued together. `numbers`: theirs in the job, FILLER for rows that only fill the
    batch; `tokens` [b, q], padded left."""

    numbers: tuple[int, ...]
    tokens: Tensor
    padding: Tensor
    cache: KVCache
    new: list[list[int]] = field(default_factory=list[list[int]])
    steps: int = 0
    last: Tensor | None = None

    @classmethod
    def of(
        cls,
        numbers: Sequence[int],
        prompts: Sequence[Sequence[int]],
        most: int,
        device: torch.device,
        multiple: int = 1,
    ) -> Batch:
        """`most`: new tokens per sequence at most. Rows are filled up to a multiple, as experts over tp want."""
        missing = -len(prompts) % multiple
        numbers, prompts = (*numbers, *[FILLER] * missing), (*prompts, *[prompts[-1]] * missing)
        longest = max(len(p) for p in prompts)
        padding = [longest - len(p) for p in prompts]
        rows = [[0] * empty + list(p) for empty, p in zip(padding, prompts, strict=True)]
        tokens = torch.tensor(rows, dtype=torch.long, device=device)
        pad = torch.tensor(padding, dtype=torch.long, device=device)
        return cls(numbers, tokens, pad, KVCache(pad, longest + most), [[] for _ in prompts])

    def take(self, tokens: Tensor, ends: frozenset[int]) -> int:
        """Note a token per sequence that has not ended; returns how many were noted."""
        taken = 0
        for number, own, token in zip(self.numbers, self.new, tokens.tolist(), strict=True):
            if not (own and own[-1] in ends):
                own.append(int(token))
                taken += number != FILLER
        self.last = tokens
        return taken

    def ended(self, most: int, ends: frozenset[int]) -> bool:
        return self.steps >= most or all(own and own[-1] in ends for own in self.new)


@dataclass
class GenerationPipeline:
    """One rank's part of a replica. `back` carries tokens from the last stage to the others, apart from `pp`: on NCCL
    messages of one pair and communicator would wait for each other."""

    stage: StageModule
    pp: AxisGroup
    back: dist.ProcessGroup
    tp: AxisGroup
    sampling: Sampling
    most: int
    ends: frozenset[int]
    dtype: torch.dtype
    device: torch.device
    progress: Callable[[int], None]
    _sent: list[tuple[dist.Work, Tensor]] = field(default_factory=list[tuple[dist.Work, Tensor]])

    def run(self, batches: Sequence[Batch], in_flight: int) -> None:
        """Continue all batches to their ends, `in_flight` at a time."""
        waiting, active = deque(batches), deque[Batch]()
        while waiting or active:
            while waiting and len(active) < in_flight:
                active.append(waiting.popleft())
                self._turn(active[-1])
            batch = active.popleft()
            self._note(batch)
            if batch.ended(self.most, self.ends):
                batch.cache = KVCache(batch.padding, 0)  # its memory is the next one's
            else:
                self._turn(batch)
                active.append(batch)
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def _turn(self, batch: Batch) -> None:
        """This stage's pass over the batch's next tokens."""
        tokens = batch.tokens if batch.last is None else batch.last.unsqueeze(1)
        inputs = tokens if self.stage.plan.first else self._receive_hidden(tokens.shape)
        output = forward_cached(self.stage, inputs, batch.cache)
        if not self.stage.plan.last:
            self._send(output.contiguous(), self.pp.rank + 1, self.pp.group, HIDDEN)
            return
        rows = self.stage.head.slices["weight"]
        batch.last = next_tokens(output, rows, self.tp, self.sampling, batch.numbers, batch.steps)
        for other in range(self.pp.size - 1):
            self._send(batch.last, other, self.back, TOKENS)

    def _note(self, batch: Batch) -> None:
        """The tokens of the batch's last turn, known to the last stage and sent to the others."""
        if self.stage.plan.last:
            tokens = batch.last
        else:
            tokens = torch.empty(len(batch.numbers), dtype=torch.long, device=self.device)
            self._receive(tokens, self.pp.size - 1, self.back, TOKENS)
        assert tokens is not None
        batch.steps += 1
        self.progress(batch.take(tokens, self.ends))

    def _receive_hidden(self, shape: torch.Size) -> Tensor:
        hidden = torch.empty((*shape, int(self.stage.config.hidden_size)), dtype=self.dtype, device=self.device)
        self._receive(hidden, self.pp.rank - 1, self.pp.group, HIDDEN)
        return hidden

    def _receive(self, tensor: Tensor, source: int, group: dist.ProcessGroup, what: str) -> None:
        self.pp.record(Collective.RECEIVE, what, tensor_bytes(tensor))
        with self.pp.waiting():
            dist.recv(tensor, src=self.pp.ranks[source], group=group)

    def _send(self, tensor: Tensor, target: int, group: dist.ProcessGroup, what: str) -> None:
        self._sent = [(work, sent) for work, sent in self._sent if not work.is_completed()]
        self.pp.record(Collective.SEND, what, tensor_bytes(tensor))
        work = dist.isend(tensor, dst=self.pp.ranks[target], group=group)
        if work is not None:
            self._sent.append((work, tensor))
