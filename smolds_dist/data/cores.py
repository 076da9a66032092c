"""Cores that this machine has left for tokenization."""

import os

SHARED = "SMOLDS_CORES_SHARED"  # in the environment of a rank that is bound to its share of the machine's cores
MOST_WORKERS = 16  # by default


def free_cores(ranks: int) -> int:
    """Return how many cores the ranks of this machine leave free at one core per rank, from 1 to `MOST_WORKERS`."""
    bound = SHARED in os.environ or not hasattr(os, "sched_getaffinity")
    cores = os.cpu_count() or 1 if bound else len(os.sched_getaffinity(0))
    return min(MOST_WORKERS, max(1, cores - ranks))


def use_all_cores() -> None:
    """Release this process from the cores that the rank that started it is bound to."""
    if SHARED in os.environ:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
