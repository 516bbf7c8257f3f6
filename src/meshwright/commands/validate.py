"""`meshwright validate`: predictions scored against measured rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meshwright.commands import options as o
from meshwright.commands import output

Rows = Annotated[Path, typer.Argument(metavar="ROWS.jsonl", help="Measured runs, one JSON object a line.")]


def validate(rows: Rows, as_json: o.Json = False) -> None:
    """Predict every measured run of a file and say how far off the predictions are, by group of rows."""
    from meshwright.report.validation_tables import validation_report
    from meshwright.validation import validate_file

    report = validate_file(rows)
    if as_json:
        output.show_json(report.to_json_dict())
    else:
        output.show(validation_report(report))
