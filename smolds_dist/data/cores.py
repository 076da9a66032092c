"""Cores that this machine has left for tokenization."""

import os

SHARED = "SMOLDS_CORES_SHARED"  # in the environment of a rank that is bound: the CPUs of all ranks of this machine
MOST_WORKERS = 16  # by default


def free_cores(ranks: int) -> int:
    """Return how many cores the ranks of this machine leave free at one core per rank, from 1 to `MOST_WORKERS`."""
    return min(MOST_WORKERS, max(1, len(_machine_cores()) - ranks))


def use_all_cores() -> None:
    """Release this process from the cores that the rank that started it is bound to."""
    if SHARED in os.environ:
        os.sched_setaffinity(0, _machine_cores())


def _machine_cores() -> set[int]:
    if SHARED in os.environ:
        return {int(cpu) for cpu in os.environ[SHARED].split(",")}
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
