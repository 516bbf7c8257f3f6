"""Jobs on two machines as far as the network can tell: torchrun in two network namespaces, for tools that need them.

In: a program, ranks per machine, the cable's rate. Out: how it ended and what it printed. Linux, root and iproute2.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

from tools.two_machines import ADDRESSES, MACHINES, connect, machine

PORT = 29481
RETRIES = 6
"""Times that the kernel sends again before it gives a connection up: 25 s. The default of 15 keeps a torchrun that is
cut off from its rendezvous in one read for 15 minutes."""
STOP_S = 40.0
"""torchrun gives its ranks 30 s to end."""


def on_two_machines(arguments: list[str], ranks_each: int, rate: str, logs: Path, limit_s: float) -> str:
    """Run `meshwright ARGUMENTS` on `ranks_each` ranks of both machines; a SystemExit where it fails."""
    codes = agents_end(["-m", "meshwright", *arguments], ranks_each, rate, logs, limit_s)
    if any(codes):
        sys.exit(f"torchrun ended with {codes}; logs are in {logs}")
    return "".join((logs / f"{name}.out").read_text() for name in MACHINES)


def agents_end(program: list[str], ranks_each: int, rate: str, logs: Path, limit_s: float) -> list[int | None]:
    """How the torchrun of each machine ended; None where it had not within `limit_s` of the other (it is killed)."""
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        lock = stack.enter_context((Path(tempfile.gettempdir()) / "meshwright-namespaces.lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)  # the namespaces have fixed names: one tool at a time
        for name in MACHINES:
            stack.enter_context(machine(name))
            give_up = ("sysctl", "-qw", f"net.ipv4.tcp_retries2={RETRIES}")
            subprocess.run(["ip", "netns", "exec", name, *give_up], check=True)
        connect(rate)
        agents = [_agent(i, program, ranks_each, logs) for i in range(len(MACHINES))]
        try:
            for agent in agents:
                with suppress(subprocess.TimeoutExpired):
                    agent.wait(limit_s)
            return [agent.poll() for agent in agents]
        finally:
            for agent in agents:
                _stop(agent)


def _stop(agent: subprocess.Popen[bytes]) -> None:
    """A torchrun that is told to end takes its ranks with it; one that is killed would leave them behind."""
    if agent.poll() is None:
        agent.terminate()
        try:
            agent.wait(STOP_S)
        except subprocess.TimeoutExpired:
            agent.kill()


def _agent(index: int, program: list[str], ranks_each: int, logs: Path) -> subprocess.Popen[bytes]:
    name = MACHINES[index]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(ranks_each)]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv-id", logs.name]
    meeting += ["--rdzv-conf", f"is_host={int(index == 0)}", "--local-addr", ADDRESSES[index]]
    command = ["ip", "netns", "exec", name, *torchrun, *meeting, *program]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": f"{name}-eth", "OMP_NUM_THREADS": "1"}
    with (logs / f"{name}.out").open("wb") as out, (logs / f"{name}.log").open("wb") as errors:
        return subprocess.Popen(command, stdout=out, stderr=errors, env=environment)
