"""The command line: one small module per command in `commands/`, gathered here.

In: the arguments. Out: an exit code - 0 done, 1 the answer is no, 2 bad input with exactly one line on stderr that
says what is wrong and how to mend it. Rooms are imported only when a command needs them, so that start-up is quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer
from typer.main import get_command

from meshwright.commands import catalogues, estimate, layout, plan, scale, validate
from meshwright.errors import InputError

DONE, NO, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="meshwright",
    help="Plan, prove, run and diagnose the split of a large language model over many accelerators.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("plan")(plan.plan)
app.command("estimate")(estimate.estimate)
app.command("layout")(layout.layout)
app.command("scale")(scale.scale)
app.command("validate")(validate.validate)
app.command("models")(catalogues.models)
app.command("clusters")(catalogues.clusters)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Never lets bad input become a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        code = get_command(app).main(arguments, prog_name="meshwright", standalone_mode=False)
        sys.stdout.flush()
    except InputError as error:
        return _complain(str(error))
    except typer.TyperException as error:
        return _complain(f"{error.format_message()} (see meshwright --help)")
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has seen enough: that is no error. Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _complain(f"cannot read or write{where}: {error.strerror or error}")
    return code if isinstance(code, int) else DONE


def _complain(message: str) -> int:
    """One line on stderr, whatever the message holds."""
    print("meshwright: " + " ".join(message.split()), file=sys.stderr)
    return BAD_INPUT
