"""Folding: of the middle of a long step, where a stage does the same for one microbatch after another, a few are run.

In: the steps of a stage. Out: a `Fold`: which steps are run, in the executor's own code and state, and where what they
did last is repeated. Steps fold only if the schedule itself repeats (the same kinds and chunks, microbatches moved on
by as many) and the last two blocks that were run did the same: every call, and every byte that came and went, in order.
Else the stage is run whole. What is repeated leaves as much alive as it found, and the end of the step is run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from meshwright.dryrun.trace import Event, Tracer
from meshwright.dryrun.tracker import Change, MemoryTracker
from meshwright.ledger import MemoryKind
from meshwright.schedules.actions import COMMUNICATION, INPUT_GRADIENTS, Action, ActionKind

Step = tuple[Action, ...]

RUN = 3
"""Blocks that are run before the first that is repeated: one that may be unlike, and two that must be alike."""


class NotAlikeError(Exception):
    """Two blocks of a schedule that repeats did not do the same."""


@dataclass(frozen=True)
class Fold:
    """`steps` of the whole stage; from `start` on it repeats `blocks` times `length` of them, each time `stride`
    microbatches further. The first `RUN` blocks are run, and the last."""

    steps: tuple[Step, ...]
    start: int
    length: int
    stride: int
    blocks: int

    @property
    def repeats(self) -> int:
        """Blocks that are not run."""
        return self.blocks - RUN - 1

    @property
    def cut(self) -> int:
        """The first step, of those that are run, after what is repeated."""
        return self.start + RUN * self.length

    @property
    def microbatches(self) -> int:
        """Those that are not run."""
        return self.repeats * self.stride

    def place(self, index: int) -> int:
        """Where a step that is run stands among all."""
        return index if index < self.cut else index + self.repeats * self.length

    def run(self) -> list[Step]:
        """The steps to run, their microbatches numbered without gaps."""
        rest = self.steps[self.place(self.cut) :]
        return [*self.steps[: self.cut], *(_moved(step, -self.microbatches) for step in rest)]


def find_fold(steps: Sequence[Step]) -> Fold | None:
    """The shortest block of which enough repeat to leave any out."""
    where = {action: index for index, step in enumerate(steps) for action in step}
    middle = next((i for i in range(len(steps) // 2, len(steps)) if steps[i][0].kind not in COMMUNICATION), None)
    if middle is None:
        return None
    count = 1 + max(a.microbatch for a in where)
    for stride in range(1, count // (RUN + 2) + 1):
        later = where.get(_moved(steps[middle][:1], stride)[0])
        if later is None:
            return None
        fold = _around(tuple(steps), middle, later - middle, stride)
        if fold is not None and fold.repeats > 0 and _is_whole(fold.run()):
            return fold
    return None


def _around(steps: tuple[Step, ...], middle: int, length: int, stride: int) -> Fold | None:
    """As far as steps repeat on both sides of the middle."""
    if length < 1:
        return None

    def repeats(index: int) -> bool:
        return 0 <= index < len(steps) - length and steps[index + length] == _moved(steps[index], stride)

    if not repeats(middle):
        return None
    first, last = middle, middle
    while repeats(first - 1):
        first -= 1
    while repeats(last + 1):
        last += 1
    return Fold(steps, first, length, stride, (last + 1 + length - first) // length)


def _is_whole(steps: Sequence[Step]) -> bool:
    """Every chunk and every message comes once for every microbatch, from 0 on, backward in one part or in two."""
    seen: dict[tuple[str, int], list[int]] = {}
    for step in steps:
        for action in step:
            kind = "backward" if action.kind in INPUT_GRADIENTS else str(action.kind)
            seen.setdefault((kind, action.chunk), []).append(action.microbatch)
            if action.kind is ActionKind.BACKWARD_INPUT:
                seen.setdefault(("split", action.chunk), []).append(action.microbatch)
    for chunk in {chunk for _, chunk in seen}:
        if sorted(seen.pop(("split", chunk), [])) != sorted(seen.pop((ActionKind.BACKWARD_WEIGHT, chunk), [])):
            return False
    count = max(len(numbers) for numbers in seen.values())
    return all(sorted(numbers) == list(range(count)) for numbers in seen.values())


def _moved(step: Step, by: int) -> Step:
    return tuple(Action(a.kind, a.chunk, a.microbatch + by) for a in step)


class FoldedStep:
    """What the executor tells (`observe`) of a folded stage, handed on to tracer and tracker as if it were whole."""

    def __init__(self, fold: Fold, tracer: Tracer, tracker: MemoryTracker) -> None:
        self._fold, self._tracer, self._tracker = fold, tracer, tracker
        self._index = 0
        self._events: list[int] = []
        self._changes: list[list[Change]] = []

    def observe(self, step: Step) -> None:
        fold, index = self._fold, self._index
        if index in (fold.cut - 2 * fold.length, fold.cut - fold.length, fold.cut):
            self._tracker.settle()
            self._events.append(len(self._tracer.events))
            self._changes.append(self._tracker.new_changes())
        if index == fold.cut:
            self._repeat()
        place = fold.place(index)
        self._tracer.at(fold.steps[place] if step else (), place)
        self._tracker.at(fold.steps[place] if step else ())
        self._index += 1

    def _repeat(self) -> None:
        fold = self._fold
        first, second, end = self._events
        before, block = self._tracer.events[first:second], self._tracer.events[second:end]
        changes = self._changes[2]
        self._tracker.keep_changes(False)
        if [moved_event(e, fold.stride, fold.length) for e in before] != block:
            raise NotAlikeError("two blocks issued different calls")
        if self._changes[1] != changes or any(_sums(changes).values()):
            raise NotAlikeError("two blocks held different memory")
        for count in range(1, fold.repeats + 1):
            self._tracer.events += [moved_event(e, count * fold.stride, count * fold.length) for e in block]
        self._tracker.repeat(changes, fold.repeats)


def _sums(changes: Sequence[Change]) -> dict[MemoryKind, int]:
    sums = dict.fromkeys(MemoryKind, 0)
    for kind, nbytes in changes:
        sums[kind] += nbytes
    return sums


def moved_event(event: Event, microbatches: int, steps: int) -> Event:
    """The same call for a later microbatch."""
    return replace(event, action=_moved_text(event.action, microbatches), step=event.step + steps)


@cache
def _moved_text(action: str, by: int) -> str:
    """'F0.3' or, of a batch of messages, 'SF0.3 RB1.2'."""
    words = (word.rpartition(".") for word in action.split(" "))
    return " ".join(f"{head}.{int(microbatch) + by}" for head, _, microbatch in words)
