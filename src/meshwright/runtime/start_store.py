"""A store of this start of the job, where torchelastic hands every start the same one.

In: the store that torchrun's environment names, in which keys of ranks that are gone may still stand (torch 2.13 keeps
one store over all restarts; a rank that reads a dead rank's address waits for it in vain). Out: that store under a name
that rank 0 made up for this start and that all its ranks have agreed on.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store

from meshwright.errors import InputError

CURRENT = "meshwright/start"
POLL_S = 0.05


def store_of_this_start(store: Store, rank: int, world: int, limit_s: float) -> Store:
    """Called on all ranks; an InputError on those that see not all come within the limit."""
    return PrefixStore(_agreed(store, rank, world, limit_s), store)


def _agreed(store: Store, rank: int, world: int, limit_s: float) -> str:
    if rank == 0:
        name = f"meshwright/start/{uuid.uuid4().hex}"
        store.set(CURRENT, name)
        try:
            store.wait([f"{name}/here/{other}" for other in range(1, world)], timedelta(seconds=limit_s))
        except RuntimeError:
            missing = [str(r) for r in range(1, world) if not store.check([f"{name}/here/{r}"])]
            raise InputError(f"rank {', '.join(missing[:8])} did not come within {limit_s:.0f} s") from None
        store.set(f"{name}/go", "")
        return name
    posted, until = "", time.monotonic() + limit_s
    while time.monotonic() < until:
        name = store.get(CURRENT).decode() if store.check([CURRENT]) else ""
        gone = bool(name) and store.check([f"{name}/go"])
        if name and name == posted and gone:
            return name
        # a start that all have joined without this rank is an earlier one
        if name and name != posted and not gone:
            store.set(f"{name}/here/{rank}", "")
            posted = name
        time.sleep(POLL_S)
    raise InputError(f"rank {rank}: the job did not start within {limit_s:.0f} s: rank 0 or another rank did not come")
