"""Variables that contradict each other, hide a hang, or are missing, are told by name."""

from __future__ import annotations

import pytest

from meshwright.doctor.environment import check_environment


@pytest.mark.parametrize(
    ("variables", "variable", "kind"),
    [
        ({"NCCL_BLOCKING_WAIT": "1"}, "NCCL_BLOCKING_WAIT", "deprecated"),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}, "TORCH_NCCL_ASYNC_ERROR_HANDLING", "harmful"),
        (
            {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"},
            *("TORCH_NCCL_BLOCKING_WAIT", "contradicts"),
        ),
        ({"NCCL_IB_DISABLE": "1", "NCCL_IB_HCA": "mlx5_0"}, "NCCL_IB_HCA", "contradicts"),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, "CUDA_LAUNCH_BLOCKING", "harmful"),
        ({}, "NCCL_SOCKET_IFNAME", "missing"),
        ({"NCCL_SOCKET_IFNAME": "eth0"}, "TORCH_FR_BUFFER_SIZE", "missing"),
    ],
)
def test_what_is_wrong_is_named(variables: dict[str, str], variable: str, kind: str) -> None:
    assert (variable, kind) in {(a.variable, a.kind) for a in check_environment(variables, hosts=2, gpus=True)}


def test_one_laptop_needs_nothing() -> None:
    assert check_environment({}, hosts=1, gpus=False) == ()
