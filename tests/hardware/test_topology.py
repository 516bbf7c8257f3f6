"""Which link a group crosses: closed arithmetic against counting."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright import hardware
from meshwright.hardware.topology import members_sharing

powers = st.sampled_from([1, 2, 4, 8, 16, 32, 64])


def counted(reach: int, size: int, stride: int, groups: int = 24) -> set[int]:
    """Members per block of `reach` ranks, over groups laid side by side as the ranks of an axis are."""
    found: set[int] = set()
    for index in range(groups * stride):
        base = index // stride * size * stride + index % stride
        blocks = [(base + i * stride) // reach for i in range(size)]
        found |= {blocks.count(b) for b in blocks}
    return found


@given(powers, powers, powers)
def test_aligned_groups_share_domains_as_counting_says(reach: int, size: int, stride: int):
    assert counted(reach, size, stride) == {int(members_sharing(reach, size, stride))}


@given(st.integers(1, 72), st.integers(1, 24), st.integers(1, 12))
def test_the_share_divides_the_group_and_is_never_more_than_some_domain_holds(reach: int, size: int, stride: int):
    share = int(members_sharing(reach, size, stride))
    assert size % share == 0
    assert share <= max(counted(reach, size, stride))


@given(powers, powers, powers, powers)
def test_nested_groups_share_domains_as_counting_says(size: int, stride: int, outer: int, gap: int):
    cluster = hardware.load("h100-sxm", nodes=64)
    outer_stride = size * stride * gap
    ranks = [o * outer_stride + i * stride for o in range(outer) for i in range(size)]
    homes = [r // 8 for r in ranks]
    expected = homes.count(0)
    assert int(hardware.members_per_domain_nested(cluster, size, stride, outer, outer_stride)) == expected


def test_axes_of_a_job_on_nodes_of_eight():
    cluster = hardware.load("h100-sxm", nodes=8)
    sizes = np.array([8, 4, 2, 16, 8])
    strides = np.array([1, 2, 8, 1, 4])
    assert hardware.members_per_domain(cluster, sizes, strides).tolist() == [8, 4, 1, 8, 2]
    assert hardware.stays_inside(cluster, sizes, strides).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(("gpus", "expected"), [(72, 72), (36, 36), (144, 72), (256, 64), (128, 64), (1024, 64)])
def test_jobs_larger_than_a_rack_take_equal_whole_trays_from_each(gpus: int, expected: int):
    cluster = hardware.load("gb200-nvl72", gpus=gpus)
    assert hardware.segment(cluster) == expected
    assert hardware.segment(hardware.load("gb200-nvl72"), gpus) == expected
    assert gpus % expected == 0
    assert bool(hardware.stays_inside(cluster, min(gpus, 4), 1))


def test_a_job_that_fills_no_whole_trays_takes_racks_as_they_come():
    assert hardware.segment(hardware.load("gb200-nvl72"), 74) == 72


def test_expert_group_of_64_stays_in_a_rack():
    cluster = hardware.load("gb200-nvl72", gpus=256)
    assert bool(hardware.stays_inside(cluster, 64, 1))
    assert int(hardware.members_per_domain(cluster, 128, 1)) == 64


def test_a_group_by_its_ranks_takes_its_slowest_link():
    cluster = hardware.load("h100-sxm", nodes=2)
    assert hardware.link_of_group(cluster, range(8)) is cluster.intra
    assert hardware.link_of_group(cluster, [7, 8]) is cluster.inter
    assert hardware.link_of_group(cluster, [3]) is cluster.intra


def test_a_million_groups_take_milliseconds():
    cluster = hardware.load("h100-sxm", nodes=512)
    size = np.full(1_000_000, 8)
    assert hardware.members_per_domain(cluster, size, size // 8).sum() == 8_000_000
