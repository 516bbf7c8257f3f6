"""The command line: one small module per command in `commands/`, gathered here.

In: the arguments. Out: an exit code - 0 done, 1 the answer is no, 2 bad input with exactly one line on stderr that
says what is wrong and how to mend it. Everything is imported inside `main`, so that an interrupt is answered there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from meshwright.errors import InputError

if TYPE_CHECKING:
    import typer

DONE, NO, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


COMMANDS = {
    "plan": "plan",
    "estimate": "estimate",
    "layout": "layout",
    "scale": "scale",
    "validate": "validate",
    "export": "export",
    "parity": "parity",
    "dryrun": "dryrun",
    "train": "train",
    "calibrate": "calibrate",
    "doctor": "doctor",
    "generate": "generate",
    "serve": "serve",
    "check-serving": "check_serving",
    "models": "catalogues",
    "clusters": "catalogues",
}
"""The module in `commands/` of every command, which it holds under the command's name."""


def app(names: Iterable[str]) -> typer.Typer:
    """The commands named. A new one is a module in `commands/` and a line above; rooms are imported only when it
    runs."""
    import typer

    from meshwright.commands import version

    made = typer.Typer(
        name="meshwright",
        help="Plan, prove, run and diagnose the split of a large language model over many accelerators.",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback()(version.options)
    for name in names:
        command = getattr(import_module(f"meshwright.commands.{COMMANDS[name]}"), name.replace("-", "_"))
        if isinstance(command, typer.Typer):
            made.add_typer(command)
        else:
            made.command(name)(command)
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

    named = arguments[0] if arguments[0] in COMMANDS else None
    # help and mistakes speak of every command; one that is named first is all that a run needs to import
    command = get_command(app([named] if named else COMMANDS))
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
