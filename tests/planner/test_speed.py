"""Searches stay fast and small: bounds far above what one idle core needs, far below what a slow path would take."""

from __future__ import annotations

import subprocess
import sys
from time import process_time

from meshwright.cost.workload import Workload
from meshwright.hardware.load import load as load_cluster
from meshwright.hardware.load import resize
from meshwright.models import load
from meshwright.planner.search import search


def test_all_of_175b_on_4096_gpus_is_searched_within_two_cpu_seconds() -> None:
    model, machine = load("gpt3-175b"), resize(load_cluster("a100-80gb"), gpus=4096)
    start = process_time()
    found = search(model, machine, Workload(seq=2048), 1536)
    assert process_time() - start < 2.0, "measured: 0.2 s"
    assert found.counts.enumerated > 100_000
    assert found.best


def test_a_search_of_millions_stays_under_one_gigabyte() -> None:
    code = (
        "import resource, sys\n"
        "from meshwright.cost.workload import Workload\n"
        "from meshwright.hardware.load import load as cluster, resize\n"
        "from meshwright.models import load\n"
        "from meshwright.planner.search import search\n"
        "found = search(load('deepseek-v3'), resize(cluster('h800'), gpus=2048), Workload(seq=4096), 15360)\n"
        "assert found.counts.enumerated > 5_000_000\n"
        "unit = 1 if sys.platform == 'darwin' else 1024\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert int(run.stdout) < 2**30
