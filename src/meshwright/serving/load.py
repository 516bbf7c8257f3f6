"""A load test of a running server: clients in a closed loop, or arrivals at a rate; some leave in mid-answer.

In: the server's URL and a `LoadPlan`, bounded in time and count. Out: `LoadReport`: how every request ended - no
answer is unaccounted for - and time to the first token, per output token, and rates, with percentiles.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from queue import Empty, SimpleQueue

from meshwright.serving.client import AnswerError, Completion, stream

PERCENTILES = (50, 90, 99)


class End(StrEnum):
    """How a request ended."""

    COMPLETE = "complete"
    LEFT = "client left"
    SHORT = "fewer tokens than asked for"
    FAILED = "failed"


@dataclass(frozen=True)
class LoadPlan:
    """`clients` at once in a closed loop; with `rate` requests per second arrive instead, up to `clients` at once.
    Nothing starts after `seconds`. `leave`: share of requests whose client leaves at a random token."""

    model: str
    prompt_tokens: int
    new_tokens: int
    vocabulary: int
    requests: int
    seconds: float
    clients: int
    rate: float | None = None
    leave: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """One request: seconds until its first token and between its tokens, tokens that came, how it ended."""

    end: End
    tokens: int
    ttft_s: float | None
    tpot_s: float | None
    reason: str = ""


@dataclass(frozen=True)
class LoadReport:
    """`answers` of all requests that were started, in no order."""

    answers: tuple[Answer, ...]
    seconds: float
    asked: int
    reasons: tuple[str, ...] = field(default=())

    @property
    def ends(self) -> dict[str, int]:
        counted = Counter(a.end for a in self.answers)
        return {end.value: counted[end] for end in End}

    @property
    def accounted_for(self) -> bool:
        """Every started request has an end, and none is a failure or short."""
        return len(self.answers) == self.asked and not (self.ends[End.FAILED] or self.ends[End.SHORT])

    @property
    def tokens_per_s(self) -> float:
        return sum(a.tokens for a in self.answers) / self.seconds

    def ttft_s(self) -> dict[int, float]:
        return percentiles([a.ttft_s for a in self.answers if a.ttft_s is not None])

    def tpot_s(self) -> dict[int, float]:
        return percentiles([a.tpot_s for a in self.answers if a.tpot_s is not None])


def percentiles(values: Sequence[float]) -> dict[int, float]:
    """Nearest-rank percentiles; empty where there are no values."""
    ordered = sorted(values)
    return {p: ordered[max(0, -(-p * len(ordered) // 100) - 1)] for p in PERCENTILES} if ordered else {}


def run_load(url: str, plan: LoadPlan) -> LoadReport:
    """Send the load and wait for every answer."""
    draw = random.Random(plan.seed)
    waiting: SimpleQueue[tuple[float, int, int | None]] = SimpleQueue()
    arrival = 0.0
    for number in range(plan.requests):
        leaves = draw.randrange(1, plan.new_tokens) if plan.new_tokens > 1 and draw.random() < plan.leave else None
        waiting.put((arrival, number, leaves))
        if plan.rate is not None:
            arrival += draw.expovariate(plan.rate)
    answers: list[Answer] = []
    started = time.monotonic()
    asked = [0]
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                try:
                    at, number, leaves = waiting.get_nowait()
                except Empty:
                    return
                wait = at - (time.monotonic() - started)
                if max(at, time.monotonic() - started) > plan.seconds:
                    return
                asked[0] += 1
            if wait > 0:
                time.sleep(wait)
            answer = _ask(url, plan, number, leaves)
            with lock:
                answers.append(answer)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(plan.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reasons = tuple(sorted({a.reason for a in answers if a.reason}))
    return LoadReport(tuple(answers), time.monotonic() - started, asked[0], reasons)


def _ask(url: str, plan: LoadPlan, number: int, leaves: int | None) -> Answer:
    """One streamed request, left after `leaves` tokens."""
    draw = random.Random(f"{plan.seed}/{number}")
    prompt = [draw.randrange(plan.vocabulary) for _ in range(plan.prompt_tokens)]
    start = time.monotonic()
    first = last = None
    tokens = 0
    pieces = stream(url, Completion(plan.model, prompt, plan.new_tokens))
    try:
        for at, new in pieces:
            if new:
                first = at if first is None else first
                last = at
                tokens += len(new)
            if leaves is not None and tokens >= leaves:
                pieces.close()
                return _answer(End.LEFT, tokens, start, first, last)
    except AnswerError as error:
        return _answer(End.FAILED, tokens, start, first, last, str(error))
    end = End.COMPLETE if tokens == plan.new_tokens else End.SHORT
    return _answer(end, tokens, start, first, last)


def _answer(end: End, tokens: int, start: float, first: float | None, last: float | None, reason: str = "") -> Answer:
    ttft = None if first is None else first - start
    tpot = None if first is None or last is None or tokens < 2 else (last - first) / (tokens - 1)
    return Answer(end, tokens, ttft, tpot, reason)
