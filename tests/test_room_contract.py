"""The contract that holds the table of rooms: it breaks on what the table does not allow, and only on that."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRACT = """
[importlinter]
root_package = toy
include_external_packages = True
contract_types =
    rooms: tools.room_contract.RoomsContract
    externals: tools.room_contract.ExternalsContract

[importlinter:contract:rooms]
name = rooms
type = rooms
package = toy
everyone_may = errors
table =
    errors:
    ground:
    upper: ground
    later: upper

[importlinter:contract:externals]
name = externals
type = externals
package = toy
table =
    yaml: upper
"""
GOOD = {
    "__init__.py": "",
    "errors.py": "",
    "ground/__init__.py": "from toy import errors",
    "upper/__init__.py": "import yaml\nfrom toy import errors, ground",
}


def lint(folder: Path, changed: dict[str, str]) -> subprocess.CompletedProcess[str]:
    for name, text in {**GOOD, **changed}.items():
        file = folder / "toy" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / ".importlinter").write_text(CONTRACT)
    body = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\n"
    body += "from importlinter.cli import lint_imports_command\nlint_imports_command(['--no-logo', '--no-cache'])"
    return subprocess.run(
        [sys.executable, "-c", body], capture_output=True, text=True, cwd=folder, timeout=60, check=False
    )


def test_imports_that_the_table_allows_are_kept(tmp_path: Path) -> None:
    done = lint(tmp_path, {})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("ground/deep.py", "from toy.upper import x", "toy.ground.deep:1"),
        ("ground/late.py", "def f():\n    import toy.upper", "toy.ground.late:2"),
        ("ground/outside.py", "import yaml", "toy.ground.outside:1"),
        ("stranger/__init__.py", "", "'stranger' has no line"),
    ],
)
def test_what_the_table_does_not_allow_is_named(tmp_path: Path, file: str, text: str, words: str) -> None:
    done = lint(tmp_path, {file: text})
    assert done.returncode == 1
    assert words in done.stdout
