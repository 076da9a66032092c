"""What this process does, and its last progress: what the watchdog of a job's ranks (`launching.failure`) reads."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# Seconds without progress that are normal in work which cannot report any: one call into a library or the file system.
LONG = 3600.0


@dataclass
class Work:
    """One kind of work of one thread."""

    name: str
    limit: float
    began: float


@dataclass
class Activity:
    """The work of this process; threads add their own."""

    last: float = field(default_factory=time.monotonic)  # when it last made progress, by `time.monotonic`
    passes: int = 0  # forward passes that it has begun
    works: dict[int, list[Work]] = field(default_factory=dict)  # by thread, the innermost last

    def __str__(self) -> str:
        return ", ".join(works[-1].name for works in list(self.works.values()) if works) or "starting"

    def makes_progress(self, since: float) -> bool:
        """Return True if there was progress after `since`, or some work is within its own limit."""
        now = time.monotonic()
        works = [work for works in list(self.works.values()) for work in works]
        return self.last > since or any(now < max(self.last, work.began) + work.limit for work in works)


ACTIVITY = Activity()


def beat() -> None:
    """Record progress; to be called repeatedly by everything that can take minutes."""
    ACTIVITY.last = time.monotonic()


def begin_pass() -> None:
    """Record that another forward pass begins."""
    ACTIVITY.passes += 1
    beat()


@contextmanager
def doing(name: str, limit: float = 0.0) -> Iterator[None]:
    """Name what this thread does in the block, as in "rank 3 hangs while NAME".

    Args:
        limit: seconds without `beat` that are normal for it, in addition to `parallel.timeout`.
    """
    works = ACTIVITY.works.setdefault(threading.get_ident(), [])
    work = Work(name, limit, time.monotonic())
    works.append(work)
    try:
        yield
    finally:
        works.remove(work)
        beat()
