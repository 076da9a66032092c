"""The rendezvous of a job's ranks: a store at MASTER_ADDR:MASTER_PORT, hosted by rank 0 or torchrun's agent.

torch waits there for 30 minutes without output, ignoring signals. Here a rank prints after ten seconds which ranks are
missing and which variable set the world size: most often it is left over in a shell.

Whatever hosts could answer differently is decided here by rank 0, from what all ranks report (`Rendezvous.agree`).
"""

import json
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, DistNetworkError, TCPStore

from smolds_dist.activity import beat, doing
from smolds_dist.errors import ConfigError, RankError
from smolds_dist.parallel.ranks import LOG_AFTER, RankInfo, host_name, single_process_hint, waiting_message
from smolds_dist.progress import StoppedWaitingError

ALL_JOINED = "smolds/everyone"  # the key that the last rank sets


@dataclass(frozen=True)
class WaitPolicy:
    """How a rank waits for the others."""

    timeout: float = math.inf  # seconds until all ranks have joined
    should_stop: Callable[[], bool] = lambda: False  # returns True to stop waiting


@dataclass(frozen=True)
class Rendezvous:
    """The ranks that have joined the store, or a single process."""

    info: RankInfo
    store: TCPStore | None = None
    should_stop: Callable[[], bool] = lambda: False

    def agree(self, name: str, compute: Callable[[], Any], decide: Callable[[list[Any]], Any]) -> Any:
        """Return what rank 0 decides from the ranks' values, the same on all ranks. Collective.

        Args:
            name: used once in the job.
            compute: returns this rank's value, which JSON can represent; a `ConfigError` ends all ranks.
            decide: returns the decision, called on rank 0 with the values by rank; a `ConfigError` ends all ranks.

        Raises:
            ConfigError: on all ranks, if any rank raised one.
            StoppedWaitingError: if `should_stop` ended the wait.
        """
        if self.store is None:
            return decide([compute()])
        rank, where, error = self.info.rank, f"rank {self.info.rank} on host {host_name()}", ""
        try:
            value = compute()
        except ConfigError as raised:
            value, error = None, str(raised)
        if rank == 0:
            return self._decide(self.store, name, value, error, decide)
        if error:
            self.store.set(f"{name}/error", f"{where}: {error}")
        else:
            self.store.set(f"{name}/{rank}", json.dumps(value))
            self.store.add(f"{name}/count", 1)
        # Rank 0 most likely finds the same error, and reports it for all; if it is busy, its watchdog does.
        deadline = time.monotonic() + (LOG_AFTER if error else math.inf)
        with doing("waiting for the other ranks"):
            if not self._wait(self.store, f"{name}/decision", deadline):
                raise ConfigError(f"{where}: {error}")
        answer = json.loads(self.store.get(f"{name}/decision"))
        if "error" in answer:
            raise ConfigError(answer["error"])
        return answer["decision"]

    def first(self, name: str, make: Callable[[], str]) -> str:
        """Return what rank 0 makes, on all ranks. Collective."""
        assert self.store is not None
        if self.info.rank == 0:
            self.store.set(name, make())
        self._wait(self.store, name, math.inf)
        return self.store.get(name).decode()

    def _decide(self, store: TCPStore, name: str, value: Any, error: str, decide: Callable[[list[Any]], Any]) -> Any:
        """Gather the values, decide and broadcast; the first error ends the wait for the other ranks."""
        world, pause = self.info.world_size, 0.002
        try:
            with doing("waiting for the other ranks"):
                while not error and store.add(f"{name}/count", 0) < world - 1:
                    if store.check([f"{name}/error"]):
                        error = store.get(f"{name}/error").decode()
                    pause = self._pause(pause)
            if error:
                raise ConfigError(error)
            values = [value, *map(json.loads, store.multi_get([f"{name}/{rank}" for rank in range(1, world)]))]
            decision = json.loads(json.dumps(decide(values)))  # as the other ranks read it: lists for tuples
        except ConfigError as raised:
            store.set(f"{name}/decision", json.dumps({"error": str(raised)}))
            raise
        store.set(f"{name}/decision", json.dumps({"decision": decision}))
        return decision

    def _wait(self, store: TCPStore, key: str, deadline: float) -> bool:
        pause = 0.002
        while not store.check([key]):
            if time.monotonic() > deadline:
                return False
            pause = self._pause(pause)
        return True

    def _pause(self, seconds: float) -> float:
        if self.should_stop():
            raise StoppedWaitingError
        time.sleep(seconds)
        return min(0.5, 1.2 * seconds)


def rendezvous(info: RankInfo, wait_policy: WaitPolicy) -> Rendezvous:
    """Join the ranks' store and wait for all others.

    Raises:
        RankError: on the first of the ranks that joined, after `wait_policy.timeout` seconds.
        ConfigError: on the others.
        StoppedWaitingError: if `wait_policy.should_stop` ended the wait.
    """
    start, logged, pause = time.monotonic(), False, 0.01
    store: TCPStore | None = None
    while not wait_policy.should_stop():
        beat()
        try:
            store = store or _store(info)
            if store and store.check([ALL_JOINED]):
                return Rendezvous(info, store, wait_policy.should_stop)
        except DistError:  # the store's host has exited
            store = None
        waited = time.monotonic() - start
        if (waited > LOG_AFTER and not logged) or waited > wait_policy.timeout:
            logged = True
            missing, first = _missing(info, store)
            text = waiting_message(info, waited, f"{missing} at {master_address()}")
            if waited > wait_policy.timeout:
                raise RankError(text) if first else ConfigError(text)
            if first:
                print(f"smolds: {text}", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(0.5, 1.2 * pause)
    raise StoppedWaitingError


def master_address() -> str:
    """Return the address of the ranks' store, HOST:PORT."""
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
    # Slurm's warning would end the process in the store's own thread while no handler is installed.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        store = TCPStore(
            host, port, is_master=keeps, timeout=timedelta(seconds=10), wait_for_workers=False, multi_tenant=True
        )
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise RankError(
            f"{master_address()}, the rendezvous address, is in use by another program; set MASTER_PORT to a free port, or "
            f"{single_process_hint(info)}."
        ) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
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
