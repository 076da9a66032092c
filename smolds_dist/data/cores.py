"""Cores: how many of this machine's are left for tokenising."""

import os

SHARED = "SMOLDS_CORES_SHARED"  # in the environment of a rank that was bound to its part of all cores of the machine
MOST_WORKERS = 16  # that are started without being asked for


def free_cores(ranks: int) -> int:
    """Cores that the ranks of this machine leave free, if each of them needs one; 1 to `MOST_WORKERS`."""
    bound = SHARED in os.environ or not hasattr(os, "sched_getaffinity")
    cores = os.cpu_count() or 1 if bound else len(os.sched_getaffinity(0))
    return min(MOST_WORKERS, max(1, cores - ranks))


def use_all_cores() -> None:
    """Frees a process from the part of the cores that the rank that started it was bound to."""
    if SHARED in os.environ:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
