"""The rendezvous of a job's ranks: a store at MASTER_ADDR:MASTER_PORT, hosted by rank 0 or torchrun's agent.

torch waits there for 30 minutes without output, ignoring signals. Here a rank prints after ten seconds which ranks are
missing and which variable set the world size: most often it is left over in a shell.
"""

import math
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import DistError, DistNetworkError, TCPStore

from smolds_dist.errors import ConfigError, RankError
from smolds_dist.parallel.ranks import LOG_AFTER, RankInfo, single_process_hint, waiting_message

ALL_JOINED = "smolds/everyone"  # the key that the last rank sets


@dataclass(frozen=True)
class WaitPolicy:
    """How a rank waits for the others."""

    timeout: float = math.inf  # seconds
    should_stop: Callable[[], bool] = lambda: False  # returns True to stop waiting
    heartbeat: Callable[[], None] = lambda: None  # called while waiting


def rendezvous(info: RankInfo, wait_policy: WaitPolicy) -> TCPStore | None:
    """Return the store that all ranks have joined, or None if `wait_policy.should_stop` ended the wait.

    Raises:
        RankError: on the first of the ranks that joined, after `wait_policy.timeout` seconds.
        ConfigError: on the others.
    """
    start, logged, pause = time.monotonic(), False, 0.01
    store: TCPStore | None = None
    while not wait_policy.should_stop():
        wait_policy.heartbeat()
        try:
            store = store or _store(info)
            if store and store.check([ALL_JOINED]):
                return store
        except DistError:  # the store's host has exited
            store = None
        waited = time.monotonic() - start
        if (waited > LOG_AFTER and not logged) or waited > wait_policy.timeout:
            logged = True
            missing, first = _missing(info, store)
            text = waiting_message(info, waited, f"{missing} at {_address()}")
            if waited > wait_policy.timeout:
                raise RankError(text) if first else ConfigError(text)
            if first:
                print(f"smolds: {text}", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(0.5, 1.2 * pause)
    return None


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _key(rank: int) -> str:
    return f"smolds/rank/{rank}"


def _store(info: RankInfo) -> TCPStore | None:
    """Connect to the store, if it answers, and register this rank.

    torch and DeepSpeed open their own stores at the same port.

    Raises:
        RankError: if another program uses the port.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keeps = info.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not keeps:
        # torch would print pages about a failed connection.
        try:
            socket.create_connection((host, port), timeout=1).close()
        except OSError:
            return None
    try:
        store = TCPStore(
            host, port, is_master=keeps, timeout=timedelta(seconds=10), wait_for_workers=False, multi_tenant=True
        )
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise RankError(
            f"{_address()}, the rendezvous address, is in use by another program; set MASTER_PORT to a free port, or "
            f"{single_process_hint(info)}."
        ) from None
    if not store.check([_key(info.rank)]):
        store.set(_key(info.rank), "")
        if store.add("smolds/count", 1) == info.world_size:
            store.set(ALL_JOINED, "")
    return store


def _missing(info: RankInfo, store: TCPStore | None) -> tuple[str, bool]:
    """Describe the missing ranks, and return whether this rank is the first of those that joined."""
    try:
        absent = [rank for rank in range(info.world_size) if store and not store.check([_key(rank)])]
    except DistError:
        absent = []
    if not absent:  # the store does not answer
        return "rank 0" if info.rank else "this host to answer", True
    numbers = ", ".join(map(str, absent[:8])) + (f" and {len(absent) - 8} others" if len(absent) > 8 else "")
    return f"rank{'s' if len(absent) > 1 else ''} {numbers}", set(range(info.rank)) <= set(absent)
