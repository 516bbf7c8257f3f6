"""Orders of one stage for schedules that split the backward pass: ZB-H1, ZBV, DualPipeV.

The gradient of the input is on the critical path of the pipeline, the gradient of the weights is not, so weight
gradients fill what would be bubbles (Qi et al. 2023, arXiv 2401.10241). Each function returns (kind, local chunk,
microbatch) of one stage; V-shaped orders need m >= 2p and are cut down to fewer microbatches by `orders.build`.
"""

from __future__ import annotations

from collections import deque

from meshwright.schedules.actions import ActionKind
from meshwright.schedules.one_forward_one_backward import LocalAction


class _Order:
    """Collects the actions of a stage, counting microbatches per (kind, chunk), and queues weight gradients."""

    def __init__(self) -> None:
        self.actions: list[LocalAction] = []
        self._next: dict[tuple[ActionKind, int], int] = {}
        self._weights: deque[tuple[int, int]] = deque()

    def _add(self, kind: ActionKind, chunk: int, counter: ActionKind) -> int:
        microbatch = self._next.get((counter, chunk), 0)
        self._next[(counter, chunk)] = microbatch + 1
        self.actions.append((kind, chunk, microbatch))
        return microbatch

    def forward(self, chunk: int) -> None:
        self._add(ActionKind.FORWARD, chunk, ActionKind.FORWARD)

    def backward(self, chunk: int) -> None:
        """Both gradients of the chunk's next microbatch."""
        self._add(ActionKind.BACKWARD, chunk, ActionKind.BACKWARD)

    def backward_input(self, chunk: int) -> None:
        """The input gradient of the chunk's next microbatch; its weight gradient is queued."""
        microbatch = self._add(ActionKind.BACKWARD_INPUT, chunk, ActionKind.BACKWARD)
        self._weights.append((chunk, microbatch))

    def backward_weight(self) -> None:
        """The weight gradient that has waited longest."""
        chunk, microbatch = self._weights.popleft()
        self.actions.append((ActionKind.BACKWARD_WEIGHT, chunk, microbatch))

    def remaining_weights(self) -> None:
        while self._weights:
            self.backward_weight()

    @property
    def weights_waiting(self) -> int:
        return len(self._weights)


def zb_h1_order(stage: int, stages: int, microbatches: int) -> list[LocalAction]:
    """ZB-H1: the order of 1F1B with stage s holding back up to s weight gradients (Qi et al. 2023, section 2.3).

    So every stage holds p activations at its peak, as stage 0 of 1F1B does.
    """
    order = _Order()
    ahead = min(stages - stage - 1, microbatches)
    for _ in range(ahead):
        order.forward(0)
    for mb in range(microbatches):
        if mb + ahead < microbatches:
            order.forward(0)
        order.backward_input(0)
        if order.weights_waiting > stage:
            order.backward_weight()
    order.remaining_weights()
    return order.actions


def zbv_order(stage: int, stages: int, microbatches: int) -> list[LocalAction]:
    """ZB-V (Qi et al. 2023, section 6; V-ZB of Qi et al. 2024, arXiv 2405.15362), for m >= 2p."""
    order = _Order()
    left = stages - stage
    for _ in range(2 * left - 1):
        order.forward(0)
    for _ in range(stage):
        order.forward(1)
        order.forward(0)
    for _ in range(left):
        order.forward(1)
        order.backward_input(1)
        order.backward_weight()
    ahead = 2 * left - 1 + stage  # forwards of the first chunk so far; `left + stage` = p of the second
    for mb in range(microbatches - stages):
        if ahead + mb < microbatches:
            order.forward(0)
        order.backward_input(0)
        order.backward_weight()
        order.forward(1)
        order.backward_input(1)
        order.backward_weight()
    for _ in range(stage):
        order.backward_input(0)
        order.backward_input(1)
    for _ in range(left):
        order.backward_input(0)
        order.backward_weight()
    order.remaining_weights()
    return order.actions


def dualpipev_order(stage: int, stages: int, microbatches: int) -> list[LocalAction]:
    """DualPipeV: DualPipe (DeepSeek-V3, arXiv 2412.19437, section 3.2.1) cut in half, for m >= 2p.

    The pairs of a forward of one chunk and a backward of the other, which DualPipe overlaps, stand next to each
    other: a runtime may run them together.
    """
    order = _Order()
    left = stages - stage - 1
    for _ in range(2 * left):
        order.forward(0)
    for _ in range(stage + 1):
        order.forward(0)
        order.forward(1)
    for _ in range(left):
        order.backward_input(1)
        order.backward_weight()
        order.forward(1)
    for _ in range(microbatches - 2 * stages + stage + 1):
        order.forward(0)
        order.backward(1)
        order.forward(1)
        order.backward(0)
    for _ in range(left):
        order.backward(1)
        order.forward(1)
        order.backward(0)
    # 2 (s + 1) backwards of both chunks in turn; the later half keeps its weight gradients for the bubbles below.
    for turn in range(2 * (stage + 1)):
        backward = order.backward if turn <= stage else order.backward_input
        backward(1 if turn % 2 == 0 else 0)
    for _ in range(left):
        order.backward_weight()
        order.backward_input(0)
    order.remaining_weights()
    return order.actions
