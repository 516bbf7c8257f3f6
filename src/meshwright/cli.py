"""The command line: one small module per command in `commands/`, gathered here.

In: the arguments. Out: an exit code - 0 done, 1 the answer is no, 2 bad input with exactly one line on stderr that
says what is wrong and how to mend it. Everything is imported inside `main`, so that an interrupt is answered there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from meshwright.errors import InputError

if TYPE_CHECKING:
    import typer

DONE, NO, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def app() -> typer.Typer:
    """Every command. A new one is a module in `commands/` and a line here; rooms are imported only when it runs."""
    import typer

    from meshwright.commands import (
        calibrate,
        catalogues,
        check_serving,
        doctor,
        dryrun,
        estimate,
        export,
        generate,
        layout,
        parity,
        plan,
        scale,
        serve,
        train,
        validate,
        version,
    )

    made = typer.Typer(
        name="meshwright",
        help="Plan, prove, run and diagnose the split of a large language model over many accelerators.",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback()(version.options)
    made.command("plan")(plan.plan)
    made.command("estimate")(estimate.estimate)
    made.command("layout")(layout.layout)
    made.command("scale")(scale.scale)
    made.command("validate")(validate.validate)
    made.command("export")(export.export)
    made.command("parity")(parity.parity)
    made.command("dryrun")(dryrun.dryrun)
    made.command("train")(train.train)
    made.command("calibrate")(calibrate.calibrate)
    made.add_typer(doctor.doctor)
    made.command("generate")(generate.generate)
    made.command("serve")(serve.serve)
    made.command("check-serving")(check_serving.check_serving)
    made.command("models")(catalogues.models)
    made.command("clusters")(catalogues.clusters)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Never lets bad input become a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except InputError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has seen enough: that is no error. Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _complain(f"cannot read or write{where}: {error.strerror or error}")
    return code


def _run(arguments: list[str]) -> int:
    """Parse and call. Not typer's own `main`, which answers interrupts and broken pipes itself."""
    import typer
    from typer.main import get_command

    command = get_command(app())
    try:
        with command.make_context("meshwright", arguments) as context:
            code: object = command.invoke(context)
    except typer.Exit as done:  # --help, --version
        return done.exit_code
    except typer.TyperException as error:
        raise InputError(f"{error.format_message()} (see meshwright --help)") from None
    return code if isinstance(code, int) else DONE


def _complain(message: str) -> int:
    """One line on stderr, whatever the message holds."""
    print("meshwright: " + " ".join(message.split()), file=sys.stderr)
    return BAD_INPUT
