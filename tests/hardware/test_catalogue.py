"""The catalogue: every value sourced, every name resolves, numbers in plausible relation."""

import tomllib
from importlib import resources

import pytest

from meshwright import hardware
from meshwright.errors import InputError
from meshwright.hardware.catalogue import builtin

DATA = resources.files("meshwright.hardware") / "data"
NOT_VALUES = {"sources", "aliases", "architecture", "source"}
DEVICES = hardware.accelerators()

# spellings that published measurements use for the device they ran on
MEASURED = [
    "A100-40GB-SXM",
    "A100-80GB-PCIe",
    "A100-80GB-SXM",
    "A100-80GB-SXM-330W",
    "A800-80GB-SXM",
    "B200-180GB",
    "B300-288GB",
    "GB200-192GB",
    "GB300-288GB",
    "H100-80GB-SXM",
    "H100-96GB-HBM2e-500W",
    "H200-141GB",
    "H200-141GB-SXM",
    "H800-80GB-SXM",
    "L40S-48GB",
    "MI300X-192GB",
    "RTX6000Pro-96GB-PCIe",
    "V100-16GB",
    "V100-32GB",
]


def tables(file: str) -> dict:
    return tomllib.loads((DATA / file).read_text(encoding="utf-8"))


def test_every_value_of_every_accelerator_has_its_source():
    for name, table in tables("accelerators.toml")["accelerators"].items():
        unsourced = set(table) - NOT_VALUES - set(table["sources"])
        assert not unsourced, f"{name}: {unsourced}"
        assert all(len(text) > 5 for text in table["sources"].values())


def test_every_link_and_cluster_has_its_source():
    content = tables("clusters.toml")
    assert all(len(link["source"]) > 20 for link in content["links"].values())
    assert all(len(cluster["sources"]["shape"]) > 20 for cluster in content["clusters"].values())


@pytest.mark.parametrize("name", MEASURED)
def test_names_used_in_published_measurements_resolve(name: str):
    device = hardware.accelerator(name)
    family = name.lower().split("-")[0]
    assert device.name.startswith(family)


@pytest.mark.parametrize(
    "name",
    [
        *("h100-sxm", "h100-efa", "h100-roce", "h100-ethernet", "h100-pcie", "h800", "h200", "a100-80gb", "a100-40gb"),
        *("a100-pcie", "a100-ib", "a100-hdr", "a100-ethernet", "b200", "b300", "gb200-nvl72", "gb300-nvl72", "mi250x"),
        *("mi300x", "mi355x", "v100", "l40s", "a10", "cpu", "H100_SXM", " a100 "),
    ],
)
def test_clusters_load_by_name_alias_and_loose_spelling(name: str):
    cluster = hardware.load(name)
    assert hardware.check(cluster) is cluster
    assert 0 < cluster.reserved_bytes < cluster.accelerator.memory_bytes / 2
    assert cluster.usable_bytes == cluster.accelerator.memory_bytes - cluster.reserved_bytes


def test_aliases_are_no_names_and_point_at_something():
    catalogue = builtin()
    for (section, alias), name in catalogue.aliases.items():
        known = getattr(catalogue, section)
        assert name in known
        assert alias not in known, f"{alias} is a {section} of its own"


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_narrower_formats_are_no_slower_and_memory_is_near_the_name(device: hardware.Accelerator):
    peaks = device.peak_flops
    order = [peaks[p] for p in ("fp32", "tf32", "bf16", "fp8", "nvfp4") if p in peaks]
    assert order == sorted(order)
    stated = [int(word.removesuffix("gb")) for word in device.name.split("-") if word.endswith("gb")]
    for gigabytes in stated:
        assert 0.92 * gigabytes * 1e9 < device.memory_bytes < gigabytes * 2**30


def test_published_figures_of_the_commonest_devices():
    """Datasheet facts, apart from the data file: dense TFLOP/s, TB/s."""
    facts = {
        "v100": ("fp16", 125e12, 0.9e12),
        "a100": ("bf16", 312e12, 2.039e12),
        "h100": ("bf16", 989.4e12, 3.35e12),
        "h200": ("fp8", 1978.9e12, 4.8e12),
        "b200": ("nvfp4", 9e15, 8e12),
        "gb300": ("nvfp4", 15e15, 8e12),
        "mi300x": ("bf16", 1307.4e12, 5.3e12),
    }
    for name, (precision, flops, bandwidth) in facts.items():
        device = hardware.accelerator(name)
        assert device.peak(precision) == flops
        assert device.memory_bandwidth == bandwidth


@pytest.mark.parametrize(
    ("name", "precision"), [("a100", "fp8"), ("v100", "bf16"), ("h100", "nvfp4"), ("mi300x", "mxfp8")]
)
def test_a_format_that_a_device_lacks_is_refused_with_those_it_has(name: str, precision: str):
    with pytest.raises(InputError, match=f"has no {precision} matrix units; it computes in fp32"):
        hardware.accelerator(name).peak(precision)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"unknown cluster 'h100-smx' .did you mean h100-sxm"):
        hardware.load("h100-smx")
    with pytest.raises(InputError, match="unknown accelerator 'A1000'"):
        hardware.accelerator("A1000")
    with pytest.raises(InputError, match="unknown cluster ''; known: "):
        hardware.load("")
