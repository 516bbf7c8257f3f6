"""Execute a pipeline schedule: any valid list of actions, over batched isend/irecv, with reused receive buffers.

In: a schedule with its messages, the chunk modules of this stage, and the microbatches of a step. Out: the summed loss
(on the stage that holds the last chunk). One stage without peers is the case without messages: gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.ledger import Collective, Phase
from meshwright.runtime.collectives import tensor_bytes
from meshwright.runtime.expert_parallel.balance import BALANCE, TravellingBalance
from meshwright.runtime.process_groups import AxisGroup
from meshwright.runtime.split_backward import Accumulator, LeftWeights
from meshwright.runtime.stage import StageModule
from meshwright.runtime.step_trace import OpenCall
from meshwright.schedules.actions import COMMUNICATION, SENDS, Action, ActionKind, PipelineSchedule
from meshwright.schedules.communication import batches

SUBJECTS = {
    ActionKind.SEND_FORWARD: "stage output",
    ActionKind.RECEIVE_FORWARD: "stage input",
    ActionKind.SEND_BACKWARD: "stage input gradient",
    ActionKind.RECEIVE_BACKWARD: "stage output gradient",
}
"""What travels, as docs/ledger.md calls it."""


@dataclass(frozen=True)
class Microbatch:
    """Token ids and labels, [b, s] each, and which sequence of the global batch is the first."""

    tokens: Tensor
    labels: Tensor
    sequence: int = 0


@dataclass(frozen=True)
class ActivationShape:
    """What travels between stages: shape and dtype of hidden states outside tensor-parallel blocks."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class BufferPool:
    """Receive buffers of one shape, handed out and taken back; as many exist as were ever live at once."""

    def __init__(self, shape: ActivationShape) -> None:
        self._shape = shape
        self._free: list[Tensor] = []
        self.created = 0

    def take(self) -> Tensor:
        if self._free:
            return self._free.pop()
        self.created += 1
        return torch.empty(self._shape.shape, dtype=self._shape.dtype, device=self._shape.device)

    def give_back(self, buffer: Tensor) -> None:
        self._free.append(buffer)


@dataclass
class Incoming:
    """A receive under way and its buffer. `calls`: what a timeline of the step knows it by."""

    buffer: Tensor
    works: list[dist.Work] = field(default_factory=list[dist.Work])
    calls: tuple[OpenCall | None, ...] = ()

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        self.works.clear()
        return self.buffer


@dataclass(frozen=True)
class Outgoing:
    """A send under way, what it sends, and the global rank that receives."""

    work: dist.Work
    tensor: Tensor
    peer: int
    calls: tuple[OpenCall | None, ...] = ()


Key = tuple[int, int]
"""(chunk, microbatch)"""


@dataclass
class Live:
    """What a stage holds between the actions of a step."""

    balance: TravellingBalance | None = None
    inputs: dict[Key, Tensor] = field(default_factory=dict[Key, Tensor])
    outputs: dict[Key, Tensor] = field(default_factory=dict[Key, Tensor])
    incoming: dict[Action, Incoming] = field(default_factory=dict[Action, Incoming])
    handed_over: dict[Key, Tensor] = field(default_factory=dict[Key, Tensor])  # output for the next chunk, same stage
    input_gradients: dict[Key, Tensor] = field(default_factory=dict[Key, Tensor])
    # receive buffers in use: of the input until backward, then of a split pass's output gradient until its weights
    buffers: dict[Key, Tensor] = field(default_factory=dict[Key, Tensor])
    weight_gradients: dict[Key, list[LeftWeights]] = field(default_factory=dict[Key, list[LeftWeights]])
    sends: list[Outgoing] = field(default_factory=list[Outgoing])


class Reducer(Accumulator, Protocol):
    """What the executor tells data parallelism (see data_parallel.py)."""

    def before_backward(self, chunk: int, last: bool, split: bool = False) -> None: ...

    def after_weights(self, chunk: int, last: bool) -> None: ...


def _sum(total: Tensor | None, loss: Tensor | None) -> Tensor | None:
    return loss if total is None else total if loss is None else total + loss


def _unobserved(_step: tuple[Action, ...]) -> None:
    """Nobody watches."""


class PipelineExecutor:
    """Runs one stage of a schedule. Build it once; `run` executes a step. `observe` is told what comes next, and
    at the end nothing."""

    def __init__(
        self,
        schedule: PipelineSchedule,
        chunks: dict[int, StageModule],
        pp: AxisGroup,
        activation: ActivationShape,
        reducer: Reducer,
        forward_context: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.schedule = schedule
        self.chunks = chunks
        self.pp = pp
        self.activation = activation
        self.pool = BufferPool(activation)
        self.current: Action | None = None  # what is being done now, for whoever asks after a failure
        self.follow(batches(schedule.actions[pp.rank]))
        self._reducer = reducer
        self._forward_context = forward_context
        self.observe: Callable[[tuple[Action, ...]], None] = _unobserved
        self._message_bytes = tensor_bytes(torch.empty(activation.shape, dtype=activation.dtype, device="meta"))

    def follow(self, steps: Sequence[tuple[Action, ...]]) -> None:
        """Run these steps (one computation, or a batch of messages) in the place of the stage's own: a dry run leaves
        out what only repeats."""
        self.steps = tuple(steps)
        own = [action for step in steps for action in step]
        self._last_backward = {a.chunk: a for a in own if a.kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_WEIGHT)}
        self._split = {(a.chunk, a.microbatch) for a in own if a.kind is ActionKind.BACKWARD_INPUT}

    def run(self, microbatches: Sequence[Microbatch], loss_scale: float = 1.0) -> Tensor | None:
        """One step. Gradients are those of `loss_scale` times the summed token losses; the sum itself is returned,
        detached, by the stage of the last chunk."""
        if len(microbatches) != self.schedule.microbatches:
            raise ValueError(f"schedule of {self.schedule.microbatches} microbatches got {len(microbatches)}")
        live, total = Live(self._balance()), None
        for step in self.steps:
            action = step[0]
            self._begins(step)
            if action.kind in COMMUNICATION:
                self._communicate(step, live)
            elif action.kind is ActionKind.FORWARD:
                with self.pp.recorder.during(Phase.FORWARD):
                    total = _sum(total, self._forward(action, microbatches[action.microbatch], live))
            elif action.kind is ActionKind.BACKWARD_WEIGHT:
                with self.pp.recorder.during(Phase.BACKWARD):
                    self._backward_weight(action, live)
            else:
                with self.pp.recorder.during(Phase.BACKWARD):
                    self._backward(action, loss_scale, live)
        for message in live.sends:
            with self.pp.waiting(message.peer, *message.calls):
                message.work.wait()
        self._begins(())
        return total

    def _balance(self) -> TravellingBalance | None:
        """A step's part of the load-balancing loss, where the model has one."""
        watched = {chunk: module.balance for chunk, module in self.chunks.items() if module.balance is not None}
        return TravellingBalance(watched, self.schedule.total_chunks - 1) if watched else None

    def _forward(self, action: Action, microbatch: Microbatch, live: Live) -> Tensor | None:
        key = (action.chunk, action.microbatch)
        module = self.chunks[action.chunk]
        trains = not self.schedule.forward_only
        hidden = self._input(action, microbatch, live).detach()
        if trains and not module.plan.first:
            hidden.requires_grad_()
        labels = microbatch.labels if module.plan.last else None
        with (
            torch.set_grad_enabled(trains),
            self._forward_context(),
            module.split.during(key in self._split),
            module.dropout.on(microbatch.sequence, active=trains),
        ):
            output = module(hidden, labels)
        if output is hidden:  # a chunk without layers must not pass its receive buffer on
            output = hidden.clone()
        if trains:
            live.inputs[key], live.outputs[key] = hidden, output
        elif key in live.buffers:
            self.pool.give_back(live.buffers.pop(key))
        balance = live.balance.after_forward(*key, trains) if live.balance else None
        if module.plan.last:
            return output.detach() if balance is None else output.detach() + balance
        if self.schedule.sends_forward(action.chunk):
            live.outputs.setdefault(key, output)
        else:
            live.handed_over[key] = output.detach()
        return None

    def _input(self, action: Action, microbatch: Microbatch, live: Live) -> Tensor:
        chunk, index = action.chunk, action.microbatch
        if self.chunks[chunk].plan.first:
            return microbatch.tokens
        if not self.schedule.sends_forward(chunk - 1):
            return live.handed_over.pop((chunk - 1, index))
        received = self._received(Action(ActionKind.RECEIVE_FORWARD, chunk, index), live)
        live.buffers[(chunk, index)] = received
        return received

    def _received(self, action: Action, live: Live) -> Tensor:
        incoming = live.incoming.pop(action)
        with self.pp.waiting(self._peer(action), *incoming.calls):
            return incoming.wait()

    def _backward(self, action: Action, loss_scale: float, live: Live) -> None:
        chunk, index = key = (action.chunk, action.microbatch)
        module, split = self.chunks[chunk], key in self._split
        self._reducer.before_backward(chunk, self._last_backward[chunk] == action, split)
        hidden, output = live.inputs.pop(key), live.outputs.pop(key)
        received: Tensor | None = None
        if module.plan.last:
            output, gradient = output * loss_scale, None
        elif self.schedule.sends_forward(chunk):
            gradient = received = self._received(Action(ActionKind.RECEIVE_BACKWARD, chunk, index), live)
        else:
            gradient = live.input_gradients.pop((chunk + 1, index))
        outputs, gradients = [output], [gradient]
        balance = live.balance.before_backward(*key) if live.balance else None
        if balance is not None:
            outputs.append(balance[0])
            gradients.append(balance[1] * loss_scale)
        with module.split.during(split):
            torch.autograd.backward(outputs, gradients)
        if split:
            live.weight_gradients[key] = module.split.collect()
        if hidden.grad is not None:
            live.input_gradients[key] = hidden.grad
        own_input = live.buffers.pop(key, None)
        if split and received is not None:
            live.buffers[key] = received  # the last product's weight gradient still reads it
        elif received is not None:
            self.pool.give_back(received)
        if own_input is not None:
            self.pool.give_back(own_input)

    def _backward_weight(self, action: Action, live: Live) -> None:
        """The weight gradients that the backward pass of this microbatch left."""
        for left in live.weight_gradients.pop((action.chunk, action.microbatch)):
            left.add_to(self._reducer)
        received = live.buffers.pop((action.chunk, action.microbatch), None)
        if received is not None:
            self.pool.give_back(received)
        self._reducer.after_weights(action.chunk, self._last_backward[action.chunk] == action)

    def _communicate(self, messages: tuple[Action, ...], live: Live) -> None:
        """Post a run of messages as one batch. Receives are waited for where their tensor is used, sends at the end
        of the step."""
        live.sends = [message for message in live.sends if not message.work.is_completed()]  # frees what they sent
        operations: list[dist.P2POp] = []
        posted: list[tuple[Action, Tensor, slice, tuple[OpenCall | None, ...]]] = []
        for action in messages:
            tensor = self._outgoing(action, live) if action.kind in SENDS else self.pool.take()
            first = len(operations)
            operations.append(self._operation(action, tensor))
            calls = (self._record(action),)
            if live.balance is not None:
                beside = live.balance.beside(action)
                operations.append(self._operation(action, beside))
                calls += (self._record(action, beside),)
            posted.append((action, tensor, slice(first, len(operations)), calls))
        with self.pp.waiting():
            works = dist.batch_isend_irecv(operations)
        for action, tensor, place, calls in posted:
            own = list(works[place] if len(works) == len(operations) else works)  # NCCL gives one work for the batch
            if action.kind in SENDS:
                live.sends += [Outgoing(work, tensor, self._peer(action), calls) for work in own]
            else:
                live.incoming[action] = Incoming(tensor, own, calls)

    def _operation(self, action: Action, tensor: Tensor) -> dist.P2POp:
        call = dist.isend if action.kind in SENDS else dist.irecv
        return dist.P2POp(call, tensor, self._peer(action), self.pp.group)

    def _peer(self, action: Action) -> int:
        """Global rank at the other end of a message."""
        return self.pp.ranks[self.schedule.peer(action)]

    def _outgoing(self, action: Action, live: Live) -> Tensor:
        key = (action.chunk, action.microbatch)
        if action.kind is ActionKind.SEND_BACKWARD:
            return live.input_gradients.pop(key).contiguous()
        output = live.outputs.pop(key) if self.schedule.forward_only else live.outputs[key]
        return output.detach().contiguous()

    def _begins(self, step: tuple[Action, ...]) -> None:
        """Tell everyone who watches what comes next: () where nothing is left of the schedule."""
        self.current = step[0] if step else None
        self._log(self.current)
        if step and step[0].kind not in COMMUNICATION:
            self.pp.recorder.begins(step[0].kind.value, step[0].chunk, step[0].microbatch)
        else:
            self.pp.recorder.begins("")
        self.observe(step)

    def _log(self, action: Action | None) -> None:
        """What is done now, for the flight log (None: no action of the schedule)."""
        flight = self.pp.recorder.flight
        if flight is not None and action is not None:
            flight.action(action.kind.value, action.chunk, action.microbatch)
        elif flight is not None:
            flight.action("", -1, -1)

    def _record(self, action: Action, beside: Tensor | None = None) -> OpenCall | None:
        """Book a message, or what travels beside it."""
        self._log(action)
        forward = action.kind in (ActionKind.SEND_FORWARD, ActionKind.RECEIVE_FORWARD)
        collective = Collective.SEND if action.kind in SENDS else Collective.RECEIVE
        with self.pp.recorder.during(Phase.FORWARD if forward else Phase.BACKWARD):
            peer = self._peer(action)
            what, size, dtype = SUBJECTS[action.kind], self._message_bytes, self.activation.dtype
            if beside is not None:
                what, size, dtype = BALANCE, tensor_bytes(beside), beside.dtype
            return self.pp.record(collective, what, size, dtype, peer, asynchronous=True)
