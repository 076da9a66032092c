"""The Linux control groups (cgroups) that limit this process's memory and cores."""

import contextlib
from collections.abc import Iterator
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
