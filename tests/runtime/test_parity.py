"""Every chosen layout equals one process with the plain Hugging Face model, in float64, to 1e-10."""

import pytest

from meshwright.runtime.parity import ParityJob, compare

from .layouts import CHOSEN, SEQ, Case, matrix
from .tiny import tiny


def check(case: Case) -> None:
    report = compare(ParityJob(case.config, tiny(case.family, **case.model), SEQ))
    assert report.passed, f"{case.name}: {report}"
    assert report.worst_gradient < 1e-12
    assert report.parameters > 10


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
def test_gradients_loss_and_stepped_weights_equal_the_plain_model(case: Case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", matrix(), ids=lambda case: case.name)
def test_the_whole_matrix_equals_the_plain_model(case: Case):
    check(case)
