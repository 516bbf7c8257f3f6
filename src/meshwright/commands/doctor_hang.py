"""`meshwright doctor hang`: who hangs, and in what, from the flight logs in a run's folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from meshwright.commands import output
from meshwright.commands.options import Json


def hang(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's folder, or one of Flight Recorder dumps.")],
    as_json: Json = False,
) -> int:
    """Which rank a job waits for, in which axis and action; or which rank called something else than the others.

    Works on a live run, on what its watchdog left, and after kill -9. Exit code 1: something is wrong.
    """
    from meshwright.doctor.environment import check_environment
    from meshwright.doctor.hang import diagnose_hang
    from meshwright.report.hang_report import hang_document, hang_report

    verdict, advice = diagnose_hang(folder), check_environment(os.environ)
    output.show_json(hang_document(verdict, advice)) if as_json else output.show(hang_report(verdict, advice))
    return 0 if verdict.healthy else 1


def say_verdict(folder: Path) -> None:
    """What the doctor thinks of a job that its watchdog is about to end, or that a rank has left, on stderr."""
    from meshwright.doctor.hang import diagnose_hang
    from meshwright.errors import InputError
    from meshwright.report.hang_report import hang_report

    try:
        verdict = diagnose_hang(folder)
    except InputError as error:
        print(f"meshwright: no verdict: {error}", file=sys.stderr)
        return
    if not verdict.healthy:
        output.show(hang_report(verdict), stderr=True)
