"""Other tools run as they are published, each in an environment of its own under build/, never in the project's.

In: the name of an environment and what to install. Out: its python; `run` feeds a script JSON and reads JSON back.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools.accuracy.store import ROOT

BUILD = ROOT / "build"


class UnavailableError(Exception):
    """The tool cannot be installed or run here; the text says why."""


def python_of(name: str, requirement: str) -> Path:
    """The python of an environment that holds the requirement; made where it is not there. A mark that says what was
    installed is written last: an interrupted installation is begun again."""
    folder = BUILD / name
    python, mark = folder / "bin/python", folder / ".requirement"
    if mark.exists() and mark.read_text(encoding="utf-8") == requirement:
        return python
    if not python.exists():
        _ran([sys.executable, "-m", "venv", str(folder)])
    _ran([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement])
    mark.write_text(requirement, encoding="utf-8")
    return python


def run(python: Path, script: Path, request: object, limit_s: float = 1800.0) -> Any:
    """What the script prints for a request."""
    return json.loads(_ran([str(python), str(script)], json.dumps(request), limit_s))


def _ran(words: list[str], given: str | None = None, limit_s: float = 1800.0) -> str:
    try:
        done = subprocess.run(words, input=given, capture_output=True, text=True, check=True, timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"no answer within {limit_s:.0f} s") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:] or [f"exit code {error.returncode}"]
        raise UnavailableError(last[0][:200]) from error
    return done.stdout
