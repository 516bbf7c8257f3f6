"""Peers, unpatched from PyPI: an environment of their own in build/peers-env, and one reading of one of them.

In: a work, its model saved as safetensors, and the peer's name. Out: a reading, or the error that the peer ended with
(a peer that fails is reported, never left out). DeepSpeed compiles a shared-memory collective, which is done once.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.runtime.measure import STEPS_BEFORE, Reading, Sample
from benchmarks.runtime.work import Work

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / "build" / "peers-env"
PINNED = ROOT / "constraints" / "dev.txt"
PACKAGES = ("transformers", "accelerate", "ninja", "setuptools", "deepspeed==0.19.8")
COMPILE = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
RANKS = 2
TIMEOUT_S = 900


def python() -> Path:
    """The environment's python; installs what is missing (torch first: DeepSpeed's build asks for it)."""
    found = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / ".ready").is_file():
        if not found.is_file():
            subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        install = [str(found), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(PINNED)]
        for packages in (("torch",), PACKAGES):
            subprocess.run([*install, *packages], check=True, env=_environment())
        # compiled by two ranks at once and stopped by a time limit, it would leave a lock that later starts wait for
        subprocess.run([str(found), "-c", COMPILE], check=True, env=_environment())
        (ENVIRONMENT / ".ready").touch()
    return found


def reading(name: str, work: Work, model: Path, steps: int) -> Reading | str:
    """Of all ranks of the peer, or how it failed: its last words."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        request = {
            "peer": name,
            "model": str(model),
            "vocab": work.model.vocab_size,
            "sequences": work.sequences,
            "seq": work.seq,
            "steps": steps,
            "steps_before": STEPS_BEFORE,
            "answer": str(answer),
        }
        failed = _run(json.dumps(request), Path(folder))
        if failed:
            return failed
        ranks = [json.loads(Path(f"{answer}.{rank}").read_text()) for rank in range(RANKS)]
    return Reading.of([Sample(**rank) for rank in ranks])


def _run(request: str, folder: Path) -> str | None:
    """All ranks to their end; the last line that a failing one wrote, if any fails."""
    script = Path(__file__).with_name("peer_process.py")
    port = _free_port()
    logs = [folder / f"log.{rank}" for rank in range(RANKS)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_SIZE": RANKS}
            places |= {"LOCAL_WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with log.open("wb") as output:
                processes.append(
                    subprocess.Popen(
                        [str(python()), str(script), request],
                        env=_environment() | {key: str(value) for key, value in places.items()},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        codes = _codes(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    for code, log in zip(codes, logs, strict=True):
        if code:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            errors = [line for line in lines if "Error" in line and not line.startswith(" ")]
            return f"exit code {code}: {(errors or lines or ['no output'])[-1].strip()}"
    return None if None not in codes else f"did not end within {TIMEOUT_S} s"


def _codes(processes: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """Exit codes once all have ended, one has failed, or the time is over (None: still running)."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes) or time.monotonic() > deadline:
            return codes
        time.sleep(0.2)


def _environment() -> dict[str, str]:
    """One thread a rank, DeepSpeed on the CPU without operators built beforehand, ninja of the environment."""
    path = f"{ENVIRONMENT / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
    return os.environ | {
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "DS_BUILD_OPS": "0",
        "HF_HUB_OFFLINE": "1",
        "TORCH_EXTENSIONS_DIR": str(ENVIRONMENT / "torch_extensions"),
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
