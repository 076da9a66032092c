"""`RUN/state.json`: what a run is doing and where, for whoever looks at its folder from outside, also from another host."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from smolds_dist.errors import first_line
from smolds_dist.files import replace_text
from smolds_dist.parallel.ranks import host_name, system_name

STATE = "state.json"
SUBMITTED = "submitted.json"  # of a run that waits in Slurm's queue


def write_state(run_dir: Path, entry: dict[str, Any], name: str = STATE) -> None:
    """Replaces the file as a whole; a full disk must not end a run."""
    with contextlib.suppress(OSError):
        replace_text(run_dir / name, json.dumps(entry))


def read_state(run_dir: Path, name: str = STATE) -> dict[str, Any]:
    """What the file says; empty where there is none."""
    try:
        return json.loads((run_dir / name).read_text())
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def noted_state(run_dir: Path, world_size: int) -> Iterator[Callable[[int, str], None]]:
    """Notes that this process trains the run, and how it ended. For rank 0.

    Yields:
        What is to be told the exit code of a training that ended by itself or was stopped, and why, if that is known.
    """
    entry: dict[str, Any] = {
        "state": "running", "host": host_name(), "pid": os.getpid(), "system": system_name(), "ranks": world_size,
        "started": time.time(), "slurm_job": os.environ.get("SLURM_JOB_ID", ""), "why": "",
    }  # fmt: skip
    write_state(run_dir, entry)

    def end(code: int, why: str) -> None:
        entry.update(state={0: "finished", 1: "failed"}.get(code, "stopped"), why=why)

    try:
        yield end
    except BaseException as error:
        cause = error.__cause__ or error
        entry.update(state="failed", why=first_line(cause) if isinstance(cause, Exception) else type(cause).__name__)
        raise
    finally:
        if entry["state"] == "running":  # left without a word
            entry["state"] = "failed"
        write_state(run_dir, entry | {"ended": time.time()})
