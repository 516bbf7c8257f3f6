"""`meshwright --version`: the options of the program itself, before any command."""

from __future__ import annotations

from typing import Annotated

import typer


def _show(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"meshwright {version('meshwright')}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_show, is_eager=True, help="Print the version.")]


def options(version: Version = False) -> None:
    """Plan, prove, run and diagnose the split of a large language model over many accelerators."""
