"""Clusters from a user's file: same form as the catalogue, every slip named in one line."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright import hardware
from meshwright.errors import InputError
from meshwright.hardware.catalogue import builtin, read_catalogue

GOOD = """
[links.mine]
bandwidth = 40e9
latency_s = 3e-6

[accelerators.chip]
aliases = ["chippy"]
memory_bytes = 64_000_000_000
memory_bandwidth = 2e12
peak_flops = { bf16 = 400e12 }
sm_count = 64
architecture = "own"
reserved_bytes = 1_000_000_000

[clusters.lab]
accelerator = "chippy"
nodes = 4
gpus_per_node = 16
intra = "nvlink4"
inter = "mine"
nics_per_gpu = 0.5
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "own.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_file_may_define_device_link_and_cluster(tmp_path: Path):
    cluster = hardware.load(write(tmp_path, GOOD), nodes=2)
    assert (cluster.name, cluster.gpus, cluster.domain) == ("lab", 32, 16)
    assert cluster.inter.bandwidth == 20e9
    assert cluster.reserved_bytes == 1_000_000_000
    assert cluster.intra == hardware.load("h100-sxm").intra


def test_links_and_devices_may_stand_in_place(tmp_path: Path):
    text = """
[clusters.tiny]
gpus_per_node = 2
intra = { bandwidth = 1e9, latency_s = 0.0, efficiency = 1.0 }
inter = "tcp-25"
[clusters.tiny.accelerator]
memory_bytes = 1_000
memory_bandwidth = 1
peak_flops = { fp32 = 5 }
sm_count = 1
architecture = "toy"
"""
    cluster = hardware.load(write(tmp_path, text))
    assert cluster.accelerator.name == "tiny-device"
    assert cluster.accelerator.peak("fp32") == 5


def test_a_file_with_several_clusters_asks_which(tmp_path: Path):
    more = GOOD + '[clusters.other]\naccelerator = "h100"\ngpus_per_node = 8\nintra = "nvlink4"\ninter = "ib-ndr"\n'
    path = write(tmp_path, more)
    with pytest.raises(InputError, match=r"defines 2 clusters; name one, as .*own.toml:lab"):
        hardware.load(path)
    assert hardware.load(f"{path}:other").accelerator.name == "h100-80gb-sxm"


def test_the_built_in_catalogue_is_not_changed_by_a_file(tmp_path: Path):
    before = set(builtin().clusters)
    catalogue, defined = read_catalogue(write(tmp_path, GOOD))
    assert defined == ("lab",)
    assert set(builtin().clusters) == before
    assert "h100-sxm" in catalogue.clusters


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("gpus_per_node", "gpus_per_nod", "clusters.lab: unknown key 'gpus_per_nod' .did you mean gpus_per_node"),
        ("sm_count = 64", "", "accelerators.chip: sm_count is missing"),
        ("bandwidth = 40e9", 'bandwidth = "40e9"', "links.mine.bandwidth: .* got '40e9'"),
        ("bandwidth = 40e9", "bandwidth = true", "links.mine.bandwidth: "),
        ("bandwidth = 40e9", "bandwidth = nan", "links.mine: bandwidth must be a number above zero, got nan"),
        ("bandwidth = 40e9", "bandwidth = inf", "must be a number above zero, got inf"),
        ("bandwidth = 40e9", "bandwidth = -1", "must be a number above zero, got -1"),
        ("nodes = 4", "nodes = 4.5", "clusters.lab.nodes: "),
        ("nodes = 4", "nodes = true", "clusters.lab.nodes: "),
        ("nodes = 4", "nodes = 0", "nodes must be a number above zero"),
        ("nodes = 4", "nodes = 99999999999", "gpus must be between 1 and"),
        ("nodes = 4", "domain = 3", "domain .3. and gpus_per_node must divide one another"),
        ('"nvlink4"', '"nvlink44"', "clusters.lab.intra: unknown link 'nvlink44' .did you mean nvlink4"),
        ('accelerator = "chippy"', 'accelerator = "chipy"', "clusters.lab: unknown accelerator 'chipy'"),
        ('accelerator = "chippy"', "accelerator = 7", "clusters.lab.accelerator: "),
        ("latency_s = 3e-6", "latency_s = 3e-6\nefficiency = 1.5", "efficiency is a share of the link, at most 1"),
        ('aliases = ["chippy"]', 'aliases = "chippy"', "aliases must be a list"),
        ("{ bf16 = 400e12 }", "{ bf16 = 0 }", "bf16 must be a number above zero"),
        ("{ bf16 = 400e12 }", "5", "accelerators.chip.peak_flops"),
        ("[clusters.lab]", "[cluster.lab]", "unknown key 'cluster' .did you mean clusters"),
        ("[clusters.lab]", "[clusters.lab", "not valid TOML"),
        ("[clusters.lab]", "[links.more]", "links.more: unknown key 'accelerator'"),
    ],
)
def test_slips_are_named_with_their_place(tmp_path: Path, old: str, new: str, words: str):
    assert old in GOOD
    with pytest.raises(InputError, match=words) as error:
        hardware.load(write(tmp_path, GOOD.replace(old, new)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "defines no cluster"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
        (b"x" * 3, "not valid TOML"),
        (b"a = " + b"[" * 100_000, "nested too deeply|not valid TOML"),
        (b"clusters = 3", "clusters must be a table of tables"),
        (b"[clusters]\nlab = 3", "clusters.lab must be a table"),
        (b"#" * (2 << 20), "larger than 1 MiB"),
        (GOOD[:-30].encode(), "not valid TOML|missing"),
    ],
    ids=["empty", "binary", "text", "deep", "number", "flat", "large", "truncated"],
)
def test_hostile_files_are_refused_in_one_line(tmp_path: Path, content: bytes, words: str):
    with pytest.raises(InputError, match=words) as error:
        hardware.load(write(tmp_path, content))
    assert "\n" not in str(error.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path):
    for path in (tmp_path / "none.toml", tmp_path, tmp_path / "none" / "x"):
        with pytest.raises(InputError, match="no such file"):
            hardware.load(f"{path}/" if path == tmp_path else path)


@given(st.binary(max_size=200))
def test_random_bytes_never_escape_as_another_error(tmp_path_factory: pytest.TempPathFactory, content: bytes):
    path = write(tmp_path_factory.mktemp("bytes"), content)
    with pytest.raises(InputError):
        hardware.load(path)
