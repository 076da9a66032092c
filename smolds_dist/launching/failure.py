"""Track the state of every rank and report a failed job in one line: which rank, on which host, and why.

Every rank writes `RUN/ranks/rank_00003.json` and watches the files of its host's ranks, whichever program started them.
The first rank to find the cause writes it to `RUN/ranks/cause.txt` and prints it; the others exit silently. With
several hosts the run folder must be on a shared file system, as for checkpoints.
"""

import contextlib
import faulthandler
import os
import re
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolds_dist.errors import ConfigError
from smolds_dist.inputs import Count, Positive, Time, convert, read_json
from smolds_dist.launching import hang
from smolds_dist.launching.control_groups import control_groups
from smolds_dist.launching.state import write_state
from smolds_dist.parallel.ranks import RankInfo, host_name, process_started, process_state, system_name
from smolds_dist.progress import print_line
from smolds_dist.settings import Parallel

LOST_CONTACT = re.compile(r"connection|peer|gloo|nccl|socket|timed? ?out|broken pipe|store", re.IGNORECASE)


def job_token() -> str:
    """Return a string that is the same on all ranks of a job and differs between jobs."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT")
    return ":".join(os.environ.get(name, "") for name in names)


class RankReport:
    """This rank's entry, and the thread that watches the other ranks' entries.

    Args:
        settings: `grace`, seconds from another rank's death until this one exits forcibly, because collectives may never
            return; `timeout`, seconds without a heartbeat after which the ranks count as hung.
    """

    def __init__(self, run_dir: Path, info: RankInfo, settings: Parallel):
        self.folder = run_dir / "ranks"
        self.grace = settings.grace
        self.timeout = settings.timeout or float("inf")
        self.rank, self.world_size = info.rank, info.world_size
        self.passes = 0
        self._local_entries: list[Path] | None = None
        self._last_heartbeat = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob(f"rank_{info.rank:05}.*"):
            old.unlink(missing_ok=True)
        self._remove_stale_files()
        self._fault_file = (self.folder / f"rank_{info.rank:05}.crash").open("w")
        faulthandler.enable(self._fault_file)  # records a segmentation fault
        memory_events = _memory_events()
        self.entry: dict[str, Any] = {
            "rank": info.rank, "host": host_name(), "pid": os.getpid(), "system": system_name(), "job": job_token(),
            "started": time.time(), "memory_events": memory_events, "kills_before": _out_of_memory_kills(memory_events),
            "state": "running",
        }  # fmt: skip
        self._write()
        if info.world_size > 1:
            threading.Thread(target=self._watch, name="watch-ranks", daemon=True).start()

    def _remove_stale_files(self) -> None:
        """Remove an earlier job's files, those older than this process. Every rank does, as each watches from the start."""
        begun = process_started()
        for name in ("cause.txt", hang.HANG_MARKER, hang.STACKS):
            with contextlib.suppress(FileNotFoundError):
                if (self.folder / name).stat().st_mtime < begun:
                    (self.folder / name).unlink()

    def _write(self) -> None:
        write_state(self.folder, self.entry, f"rank_{self.rank:05}.json")

    def heartbeat(self) -> None:
        """Record that another forward pass begins."""
        self.passes += 1
        self.touch()

    def touch(self) -> None:
        """Record progress other than a forward pass."""
        self._last_heartbeat = time.monotonic()

    def end(self, state: str = "done", code: int = 0) -> None:
        """Record the rank's final state and exit code."""
        self.entry |= {"state": state, "code": code}
        self._write()
        faulthandler.enable()
        self._fault_file.close()

    def fail(self, error: BaseException) -> None:
        """Record the error, write its traceback to `rank_N.log`, and report the cause if no rank has."""
        log = self.folder / f"rank_{self.rank:05}.log"
        with contextlib.suppress(OSError):  # of a full disk
            log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        last_line = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        self.entry["state"] = "failed"
        self._write()
        if isinstance(error, RuntimeError | OSError) and LOST_CONTACT.search(str(error)):
            # The peer of a broken connection is the cause; ranks on its host can identify it.
            deadline = time.monotonic() + min(3.0, self.grace)
            while time.monotonic() < deadline:
                if any(entry["state"] == "refused" for entry in rank_entries(self.folder, self.entry["job"])):
                    self.end("refused", 2)  # one rank found a user's mistake and has reported it
                    return
                if self._report_dead_rank():
                    return
                time.sleep(0.2)
            others = [e for e in rank_entries(self.folder, self.entry["job"]) if e["system"] != system_name()]
            gone = [e for e in others if e["state"] == "running"]
            if gone:
                word, ranks = "rank" if len(gone) == 1 else "one of the ranks", ", ".join(str(e["rank"]) for e in gone)
                who = f"{word} {ranks} on host {gone[0]['host']}"
                report_cause(self.folder, f"{who} was killed or lost its network ({last_line})")
                return
        report_cause(
            self.folder, f"rank {self.rank} on host {self.entry['host']} failed: {last_line} (traceback: {log})"
        )

    def local_entries(self) -> list[Path] | None:
        """Return the entries of this host's ranks, the only ones whose death is detectable here. None, meaning all, until
        every rank has written its entry for this start, which is certain after the first forward pass."""
        if self._local_entries is None and self.passes:
            entries = rank_entries(self.folder, self.entry["job"])
            if len(entries) == self.world_size:  # else a file was being replaced
                mine = [entry["rank"] for entry in entries if entry["system"] == system_name()]
                self._local_entries = [self.folder / f"rank_{rank:05}.json" for rank in mine]
        return self._local_entries

    def _watch(self) -> None:
        while self.entry["state"] == "running":
            time.sleep(1)
            idle = time.monotonic() - self._last_heartbeat
            if idle > self.timeout or (self.folder / hang.HANG_MARKER).exists():
                entries = [
                    entry for entry in rank_entries(self.folder, self.entry["job"]) if entry["state"] == "running"
                ]
                cause = hang.report_hang(self.folder, self.entry, entries, idle, self.passes)
                if self.entry["state"] == "running":
                    report_cause(self.folder, cause)
                    hang.kill_unresponsive(self.folder, entries)
                    sys.stderr.flush()
                    os._exit(1)
            if self._report_dead_rank():
                time.sleep(self.grace)
                if self.entry["state"] == "running":
                    sys.stderr.flush()
                    os._exit(1)

    def _report_dead_rank(self) -> bool:
        """Report a rank of this host that died without an error; return True if the cause is known."""
        cause = self.folder / "cause.txt"
        if not cause.exists() and record_dead_rank(self.folder, self.entry["job"], files=self.local_entries()):
            _log(cause.read_text(encoding="utf-8", errors="replace").strip())
        return cause.exists()


def record_dead_rank(folder: Path, job: str | None = None, since: float = 0.0, files: list[Path] | None = None) -> bool:
    """Record a rank of this host that died without an error as the cause; return True if it is the first cause.

    Args:
        files: the entries to read; default: all.
    """
    for entry in rank_entries(folder, job, files):
        if entry["state"] == "running" and entry["started"] >= since and _is_dead(entry):
            crash = folder / f"rank_{entry['rank']:05}.crash"
            fault = crash.read_text(errors="replace").splitlines() if crash.exists() else []
            if fault:
                why = f"crashed: {fault[0]} (stack: {crash})"
            else:  # any other end leaves a trace
                memory = _out_of_memory_kills(entry["memory_events"]) > entry["kills_before"]
                why = "was killed by signal 9" + (": the machine is out of memory" if memory else "")
            return _record_cause(folder, f"rank {entry['rank']} on host {entry['host']} {why}")
    return False


def signal_ranks(folder: Path, number: int, since: float) -> bool:
    """Send a signal to the running ranks of this machine; return True if there were any."""
    mine = [
        e
        for e in rank_entries(folder)
        if e["started"] >= since and e["state"] == "running" and e["system"] == system_name() and not _is_dead(e)
    ]
    for entry in mine:
        with contextlib.suppress(ProcessLookupError):
            os.kill(entry["pid"], number)
    return bool(mine)


def kill_ranks(folder: Path, since: float) -> None:
    """Kill the remaining ranks of a failed job on this machine and wait until they end.

    They may have outlived their launcher, and a restart needs their resources.
    """
    deadline = time.monotonic() + 10.0
    while signal_ranks(folder, signal.SIGKILL, since) and time.monotonic() < deadline:
        time.sleep(0.1)


def exit_code_of_stop(folder: Path, since: float) -> int | None:
    """Return the exit code of ranks stopped by a signal or a user's mistake; None if they ended in another way."""
    entries = [entry for entry in rank_entries(folder) if entry["started"] >= since]
    stopped = [entry["code"] for entry in entries if entry["state"] in ("stopped", "refused")]
    return stopped[0] if stopped and len(stopped) == len(entries) else None


def _record_cause(folder: Path, cause: str) -> bool:
    """Write the cause unless there is one already; return True if written."""
    try:
        with (folder / "cause.txt").open("x", encoding="utf-8") as file:
            file.write(cause + "\n")
    except FileExistsError:
        return False
    return True


def report_cause(folder: Path, cause: str) -> None:
    """Record the cause and print it, unless there is one already."""
    if _record_cause(folder, cause):
        _log(cause)


def _log(cause: str) -> None:
    print_line(f"\nsmolds: {cause}; the other ranks stop.", sys.stderr)


@dataclass
class RankEntry:
    """Fields read from a rank's entry. `pid` must be positive: a signal to -1 would reach all of the user's processes."""

    rank: Count
    host: str
    pid: Positive
    system: str
    started: Time
    state: str
    job: str = ""
    memory_events: str = ""
    kills_before: Count = 0
    code: int = 0


def rank_entries(folder: Path, job: str | None = None, files: list[Path] | None = None) -> list[dict[str, Any]]:
    entries = []
    for path in sorted(folder.glob("rank_*.json")) if files is None else files:
        try:
            entry = read_json(path, "delete it", dict[str, Any])
            convert(entry, RankEntry, path, "delete it")
        except (OSError, ConfigError):
            continue  # being replaced, or damaged
        if job is None or entry["job"] == job:
            entries.append(entry)
    return entries


def _is_dead(entry: dict[str, Any]) -> bool:
    return entry["system"] == system_name() and process_state(entry["pid"]) in "ZX"


def _memory_events() -> str:
    """Return the file that counts out-of-memory kills in this process's cgroup (v2 or v1), so that kills elsewhere on the
    machine do not count; without cgroups, the machine's own."""
    files = (group / name for group in control_groups("memory") for name in ("memory.events", "memory.oom_control"))
    return str(next((file for file in files if file.exists()), "/proc/vmstat"))


def _out_of_memory_kills(memory_events: str) -> int:
    try:
        match = re.search(r"^oom_kill (\d+)", Path(memory_events).read_text(), re.MULTILINE)
        return int(match.group(1)) if match else 0
    except OSError:  # the cgroup is removed with its processes
        return 0
