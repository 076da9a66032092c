"""`RUN/state.json`: a run's state, host and process, for readers of its folder on any host."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolds_dist.errors import ConfigError, first_line
from smolds_dist.files import replace_text
from smolds_dist.inputs import Positive, Time, convert, read_json
from smolds_dist.parallel.ranks import host_name, system_name

STATE = "state.json"
SUBMITTED = "submitted.json"  # of a run in Slurm's queue
FIX = "delete it"


@dataclass
class State:
    """Fields read from `STATE`."""

    state: str
    host: str
    pid: Positive
    system: str
    ranks: Positive
    started: Time
    why: str = ""


@dataclass
class Submitted:
    """Fields read from `SUBMITTED`."""

    job: str
    time: Time


KINDS: dict[str, Any] = {STATE: State, SUBMITTED: Submitted}


def write_state(run_dir: Path, entry: dict[str, Any], name: str = STATE) -> bool:
    """Replace the file atomically; return False for an error: a full disk must not end a run."""
    try:
        replace_text(run_dir / name, json.dumps(entry))
    except OSError:
        return False
    return True


def read_state(run_dir: Path, name: str = STATE, damaged_is_none: bool = True) -> dict[str, Any]:
    """Return the file's contents; empty if it is missing.

    Raises:
        ConfigError: for a damaged file, unless that counts as none.
    """
    path = run_dir / name
    try:
        entry = read_json(path, FIX, dict[str, Any]) if path.exists() else {}
        if entry and name in KINDS:
            convert(entry, KINDS[name], path, FIX)
        return entry
    except (OSError, ConfigError):
        if damaged_is_none or not path.exists():
            return {}
        raise


@contextlib.contextmanager
def record_run_state(run_dir: Path, world_size: int) -> Iterator[Callable[[int, str], None]]:
    """Record that this process trains the run, and how it ended. For rank 0.

    Yields:
        A function to call with the exit code when training finishes or is stopped, and the reason, if known.
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
        if entry["state"] == "running":  # `end` was not called
            entry["state"] = "failed"
        write_state(run_dir, entry | {"ended": time.time()})
