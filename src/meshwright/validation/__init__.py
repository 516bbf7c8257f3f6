"""Predictions against measurements: `validate_file` scores the cost model on a file of published runs."""

from meshwright.validation.report import ValidationReport
from meshwright.validation.validate import validate_file

__all__ = ["ValidationReport", "validate_file"]
