"""Score the cost model against a file of measurements: `validate_file(path) -> ValidationReport`.

In: JSON lines of training and serving runs. Out: a report. Every row is scored or skipped for a stated reason; a
malformed line is an InputError that names it.
"""

from __future__ import annotations

import json
from pathlib import Path

from meshwright.errors import InputError
from meshwright.models.fields import Fields
from meshwright.validation.lines import read_rows
from meshwright.validation.report import ValidationReport
from meshwright.validation.scored import Group, ScoredRow, SkippedRow
from meshwright.validation.serving import score_serving
from meshwright.validation.serving_row import ServingCase, is_serving, serving_case
from meshwright.validation.shapes import Shapes
from meshwright.validation.skip import SkippedError
from meshwright.validation.training import score_training
from meshwright.validation.training_row import TrainingCase, training_case

SWEEP = ("model", "gpu", "gpus", "global_batch", "seq", "precision", "framework")
"""What the rows of a sweep have in common."""


def validate_file(path: str | Path) -> ValidationReport:
    """Read, predict and score every row of a file."""
    path = Path(path)
    shapes = Shapes()
    training: list[TrainingCase] = []
    serving: list[ServingCase] = []
    skipped: list[SkippedRow] = []
    for row in read_rows(path):
        group = group_of(row)
        try:
            if is_serving(row):
                serving.append(serving_case(row, group, shapes))
            else:
                training.append(training_case(row, group, shapes))
        except SkippedError as reason:
            skipped.append(SkippedRow(group.id, str(reason)))
        except InputError as error:
            raise _labelled(row, error) from error
    scored: list[ScoredRow] = []
    for row in (*score_training(training), *score_serving(serving)):
        if row.says_anything:
            scored.append(row)
        else:
            skipped.append(SkippedRow(row.group.id, "nothing measured that is predicted"))
    return ValidationReport(path.name, tuple(scored), tuple(skipped))


def _labelled(row: Fields, error: InputError) -> InputError:
    """The error with the row's file and line in front."""
    text = str(error)
    return InputError(text if text.startswith(row.label) else f"{row.label}: {text}")


def group_of(row: Fields) -> Group:
    """The row's name and the groups it is reported under."""
    section = row.section("model")
    experts = section.whole("experts", least=0) if section is not None else None
    return Group(
        id=row.text("id", default=row.label.rpartition(":")[2]),
        family=row.text("family", default=f"{row.text('framework', default='unnamed')} {row.text('kind')}".strip()),
        tier=row.text("tier", default="unrated"),
        architecture=row.text("dense_or_moe", default="moe" if experts else "dense"),
        sweep="" if is_serving(row) else json.dumps([row.values.get(name) for name in SWEEP], sort_keys=True),
    )
