"""The Linux control groups (cgroups) that limit this process's memory and cores."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path


def control_groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and its parents, for cgroup v2 and v1."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or controller in controllers.split(","):
                root = Path("/sys/fs/cgroup") / controllers
                group = root / path.lstrip("/")
                yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))


def memory_limit(groups: Iterable[Path] | None = None) -> int | None:
    """Return the memory in bytes that cgroups allow, by default this process's; None without a limit."""
    limits = []
    for folder in control_groups("memory") if groups is None else groups:
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                limits.append(int((folder / name).read_text()))
    return min((limit for limit in limits if limit < 2**60), default=None)  # v1 has a huge number for no limit
