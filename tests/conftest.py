"""What several test files share: running the command line in this process; hypothesis without a deadline, because
tests share their machine with other work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import settings

settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code and its two streams."""

    code: int
    out: str
    err: str


@pytest.fixture
def meshwright(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run `meshwright ARGS...` in this process."""
    from meshwright.cli import main

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        return Done(code, streams.out, streams.err)

    return run
