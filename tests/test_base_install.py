"""The base install has no torch: every room but runtime and dryrun, and the whole command line, work without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import meshwright

PACKAGE = Path(meshwright.__file__).parent
WITH_TORCH = ("runtime", "dryrun")
BLOCK = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "safetensors", "tokenizers", "vllm"):
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Block())
"""


def run_without_torch(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK + body], capture_output=True, text=True, timeout=120, check=False
    )


def modules() -> list[str]:
    names = (path.relative_to(PACKAGE.parent).with_suffix("") for path in PACKAGE.rglob("*.py"))
    dotted = (".".join(name.parts).removesuffix(".__init__") for name in names if name.name != "__main__")
    return sorted(name for name in dotted if name.split(".")[1:2] != [] and name.split(".")[1] not in WITH_TORCH)


def test_the_block_works() -> None:
    assert "blocked: torch" in run_without_torch("import torch").stderr


def test_every_room_without_torch_imports_without_it() -> None:
    names = modules()
    assert {"meshwright.cli", "meshwright.report.plots"} <= set(names)
    done = run_without_torch(f"import importlib\nfor name in {names!r}: importlib.import_module(name)")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_plan_is_made_without_torch() -> None:
    arguments = [
        "plan",
        "llama-3.1-8b",
        "--cluster",
        "h100-sxm",
        "--nodes",
        "1",
        "--seq",
        "4096",
        "--global-batch",
        "64",
    ]
    done = run_without_torch(f"from meshwright.cli import main\nsys.exit(main({arguments!r}))")
    assert (done.returncode, done.stderr) == (0, "")
    assert "tokens/s" in done.stdout
