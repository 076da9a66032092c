"""Linux's control groups of this process, which limit its memory and cores."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


def control_groups(controller: str) -> Iterator[Path]:
    """This process's control group and those above it, of version 2 and of version 1."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or controller in controllers.split(","):
                root = Path("/sys/fs/cgroup") / controllers
                group = root / path.lstrip("/")
                yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))
