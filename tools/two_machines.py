"""`make two-machines`: one job on two machines, as far as the network can tell - two network namespaces and a cable.

Two `torchrun` agents of two ranks each meet by c10d rendezvous over a veth pair (as slow as --rate says) and train
examples/tiny-llama-two-machines.yaml; then the same plan runs forked on this machine, and the losses must agree. Needs
Linux, root and iproute2: without them it says so and does nothing. Logs are in build/two-machines.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

FOLDER = Path("build/two-machines")
PLAN, DATA = "examples/tiny-llama-two-machines.yaml", "docs"
MACHINES = ("mw-a", "mw-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29477
LIMIT_S = 300.0
TOLERANCE = 1e-5
"""Relative, of losses in fp32: sums over ranks may be ordered otherwise."""


def reason_to_skip() -> str | None:
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    if shutil.which("ip") is None:
        return "there is no `ip` (iproute2)"
    probe = subprocess.run(["ip", "netns", "add", "mw-probe"], capture_output=True, text=True, check=False)
    if probe.returncode:
        return f"this machine allows no network namespaces ({probe.stderr.strip()})"
    run("ip", "netns", "delete", "mw-probe")
    return None


def run(*command: str) -> None:
    subprocess.run(command, check=True)


@contextmanager
def machine(name: str) -> Iterator[None]:
    """A network namespace with its loopback up; gone afterwards, and its end of the cable with it."""
    run("ip", "netns", "add", name)
    try:
        run("ip", "-n", name, "link", "set", "lo", "up")
        yield
    finally:
        run("ip", "netns", "delete", name)


def connect(rate: str | None) -> None:
    """A cable between the two: veth ends with an address each, slowed by a token bucket where a rate is given."""
    ends = [f"{name}-eth" for name in MACHINES]
    run("ip", "-n", MACHINES[0], "link", "add", ends[0], "type", "veth", "peer", "name", ends[1], "netns", MACHINES[1])
    for name, end, address in zip(MACHINES, ends, ADDRESSES, strict=True):
        run("ip", "-n", name, "address", "add", f"{address}/24", "dev", end)
        run("ip", "-n", name, "link", "set", end, "up")
        if rate:
            bucket = ("tbf", "rate", rate, "burst", "256kb", "latency", "200ms")
            run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", end, "root", *bucket)


def agent(index: int, log: Path) -> subprocess.Popen[bytes]:
    """torchrun on one machine."""
    name = MACHINES[index]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv-id", "two-machines"]
    # torchrun would look its own host name up, which means nothing inside a namespace
    meeting += ["--rdzv-conf", f"is_host={int(index == 0)}", "--local-addr", ADDRESSES[index]]
    job = ["-m", "meshwright", "train", PLAN, "--data", DATA, "--out", str(FOLDER / "joined"), "--json"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": f"{name}-eth", "OMP_NUM_THREADS": "1"}
    command = ["ip", "netns", "exec", name, *torchrun, *meeting, *job]
    print("$", " ".join(command), flush=True)
    with log.open("wb") as errors, log.with_suffix(".out").open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=errors, env=environment)


def train_on_two_machines(rate: str | None) -> dict[str, object]:
    """The JSON that rank 0 printed."""
    logs = [FOLDER / f"{name}.log" for name in MACHINES]
    with ExitStack() as stack:
        for name in MACHINES:
            stack.enter_context(machine(name))
        connect(rate)
        agents = [agent(index, log) for index, log in enumerate(logs)]
        try:
            codes = [process.wait(LIMIT_S) for process in agents]
        finally:
            for process in agents:
                if process.poll() is None:
                    process.kill()
    for name, log in zip(MACHINES, logs, strict=True):
        print(f"--- {name}\n{log.read_text(errors='replace')[-1500:]}", end="")
    if any(codes):
        sys.exit(f"two-machines: torchrun ended with {codes}; logs are in {FOLDER}")
    printed = "".join(log.with_suffix(".out").read_text() for log in logs)
    return json.loads(printed)


def train_on_one_machine() -> dict[str, object]:
    command = [sys.executable, "-m", "meshwright", "train", PLAN, "--data", DATA, "--out", str(FOLDER / "forked")]
    done = subprocess.run(
        [*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
    )
    return json.loads(done.stdout)


def losses_of(document: dict[str, object]) -> list[float]:
    losses = document["losses"]
    assert isinstance(losses, list)
    return [float(loss) for loss in losses]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", help="of the cable, as tc writes it: 100mbit")
    rate = parser.parse_args().rate
    reason = reason_to_skip()
    if reason:
        print(f"two-machines: skipped, {reason}")
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    start = time.monotonic()
    joined = losses_of(train_on_two_machines(rate))
    print(f"two machines of 2 ranks, cable {rate or 'as fast as it goes'}: {time.monotonic() - start:.0f} s")
    forked = losses_of(train_on_one_machine())
    for step, (one, two) in enumerate(zip(forked, joined, strict=True), start=1):
        print(f"step {step:>3}  loss on two machines {two:.6f}  forked on one {one:.6f}")
    worst = max(abs(one - two) / one for one, two in zip(forked, joined, strict=True))
    print(f"largest relative difference {worst:.1e}, allowed {TOLERANCE:.0e}")
    if not worst <= TOLERANCE:
        sys.exit("two-machines: the losses differ")


if __name__ == "__main__":
    main()
