"""A client of vLLM's OpenAI-compatible API, in the standard library: health, an answer as token ids, streamed or whole.

In: the server's URL. Out: token ids and when they came. Every call has a time limit; what the server refuses is an
`AnswerError` with its words.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

LOCAL_TIMEOUT_S = 5.0


class AnswerError(RuntimeError):
    """The server refused or the connection broke."""


@dataclass(frozen=True)
class Completion:
    """One request. Greedy unless `temperature` says otherwise; `ignore_eos` makes lengths certain."""

    model: str
    prompt: Sequence[int]
    new_tokens: int
    temperature: float = 0.0
    ignore_eos: bool = True

    def body(self, stream: bool) -> bytes:
        values: dict[str, Any] = {
            "model": self.model,
            "prompt": list(self.prompt),
            "max_tokens": self.new_tokens,
            "temperature": self.temperature,
            "ignore_eos": self.ignore_eos,
            "return_token_ids": True,
            "stream": stream,
        }
        return json.dumps(values).encode()


def is_healthy(url: str) -> bool:
    """Whether the server says that it is ready."""
    try:
        connection = _connect(url, LOCAL_TIMEOUT_S)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def metrics(url: str) -> str:
    """The text of /metrics."""
    connection = _connect(url, LOCAL_TIMEOUT_S)
    connection.request("GET", "/metrics")
    return connection.getresponse().read().decode()


def complete(url: str, request: Completion, timeout_s: float = 120.0) -> tuple[int, ...]:
    """The new token ids of a greedy answer, all at once."""
    response = _post(_connect(url, timeout_s), request.body(stream=False))
    choice = _choice(json.loads(response.read()))
    return tuple(cast("list[int]", choice["token_ids"]))


def stream(url: str, request: Completion, timeout_s: float = 120.0) -> Generator[tuple[float, tuple[int, ...]]]:
    """(monotonic seconds, token ids) of every piece as it comes. Closing the generator disconnects."""
    connection = _connect(url, timeout_s)
    try:
        response = _post(connection, request.body(stream=True))
        finished = False
        for line in response:
            text = line.decode().strip()
            if text == "data: [DONE]":
                finished = True
                break
            if text.startswith("data: "):
                tokens = _choice(json.loads(text.removeprefix("data: "))).get("token_ids") or ()
                yield time.monotonic(), tuple(cast("list[int]", tokens))
        if not finished:
            raise AnswerError("the stream ended before [DONE]")
    except (OSError, http.client.HTTPException) as error:
        raise AnswerError(f"the connection broke: {type(error).__name__}: {error}") from None
    finally:
        connection.close()


def _connect(url: str, timeout_s: float) -> http.client.HTTPConnection:
    address = urlsplit(url)
    return http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port, timeout=timeout_s)


def _post(connection: http.client.HTTPConnection, body: bytes) -> http.client.HTTPResponse:
    try:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        raise AnswerError(f"the connection broke: {type(error).__name__}: {error}") from None
    if response.status != 200:
        raise AnswerError(f"status {response.status}: {response.read(400).decode(errors='replace')}")
    return response


def _choice(document: Any) -> dict[str, Any]:
    if "error" in document:
        raise AnswerError(str(document["error"])[:300])
    choices = cast("list[dict[str, Any]]", document.get("choices") or [{}])
    return choices[0]
