"""The Linux control groups (cgroups) that limit this process's memory and cores."""

import contextlib
import re
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


def out_of_memory(events: str, kills_before: int) -> str:
    """Return the end of a message about a killed process, "" unless the kernel has killed more processes for memory.

    Args:
        events: the file with their number.
    """
    if out_of_memory_kills(events) <= kills_before:
        return ""
    return describe_memory(memory_limit(Path(events).parents))


def describe_memory(limit: int | None) -> str:
    """Return the end of a message about a process killed for memory; `limit`: its control group's, in bytes."""
    group = f"its control group, which is limited to {limit / 1e9:,.1f} GB," if limit else "the machine"
    return f": {group} is out of memory"


def memory_events() -> str:
    """Return the file that counts out-of-memory kills in this process's cgroup (v2 or v1), so that kills elsewhere on the
    machine do not count; without cgroups, the machine's own."""
    files = (group / name for group in control_groups("memory") for name in ("memory.events", "memory.oom_control"))
    return str(next((file for file in files if file.exists()), "/proc/vmstat"))


def out_of_memory_kills(events: str) -> int:
    try:
        match = re.search(r"^oom_kill (\d+)", Path(events).read_text(), re.MULTILINE)
        return int(match.group(1)) if match else 0
    except OSError:  # the cgroup is removed with its processes
        return 0
