"""`make bench-runtime`: CPU and wall seconds per step of the runtime, of plain Hugging Face and of peers, in one run.

The work: 8-layer Llama, hidden 512, ffn 1376, 8 heads, sequence 512, vocabulary 8192, 8 sequences, fp32, AdamW, one
thread per rank (and a Mixtral, and the Llama at sequence 2048). Layouts, plain processes and peers are interleaved
round by round, the median over rounds counts. Writes build/bench-runtime.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import date
from pathlib import Path

import torch
from benchmarks.runtime import measure, peers
from benchmarks.runtime.results import Readings, document, lines
from benchmarks.runtime.work import DEFAULT, LAYOUTS, WORKS

from meshwright.runtime.weights import meta_model


def rounds(number: int, steps: int, names: list[str], with_peers: bool, both_cores: bool) -> Readings:
    works = {LAYOUTS[name].work: WORKS[LAYOUTS[name].work] for name in names}
    readings = Readings()
    with tempfile.TemporaryDirectory() as folder:
        for work_name, work in works.items():
            meta_model(work.model)  # imports the model's code before forking
            if with_peers:
                measure.save_model(work, Path(folder) / work_name)
        for _ in range(number):
            for work_name, work in works.items():
                readings.add("alone", work_name, measure.plain(work, steps))
                readings.add("two at once", work_name, measure.plain(work, steps, processes=2))
                if both_cores:
                    readings.add("both cores", work_name, measure.plain(work, steps, threads=2))
            for name in names:
                work = WORKS[LAYOUTS[name].work]
                readings.add("layout", name, measure.layout(LAYOUTS[name], work, steps))
                for peer in LAYOUTS[name].peers if with_peers else ():
                    readings.add("peer", peer, peers.reading(peer, work, Path(folder) / LAYOUTS[name].work, steps))
    return readings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(DEFAULT))
    parser.add_argument("--no-peers", action="store_true", help="without DeepSpeed and tp_plan")
    parser.add_argument("--no-both-cores", action="store_true", help="without the plain process that has both cores")
    parser.add_argument("--out", type=Path, default=Path("build/bench-runtime.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.no_peers:
        peers.python()
    readings = rounds(
        arguments.rounds, arguments.steps, arguments.layouts, not arguments.no_peers, not arguments.no_both_cores
    )
    result = document(readings, arguments.layouts)
    result |= {"rounds": arguments.rounds, "steps": arguments.steps, "date": date.today().isoformat()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(lines(result)))


if __name__ == "__main__":
    main()
