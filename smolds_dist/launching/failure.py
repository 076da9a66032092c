"""Track the state of every rank and report a failed job in one line: which rank, on which host, and why.

Every rank writes `RUN/ranks/rank_00003.json` and watches the files of its host's ranks, whichever program started them.
The first rank to find the cause writes it to `RUN/ranks/cause.txt` and prints it; the others exit silently. With
several hosts the run folder must be on a shared file system, as for checkpoints. The files in `RUN/ranks`:

| file                 | written by                               | read by                                              |
|----------------------|------------------------------------------|------------------------------------------------------|
| `rank_N.json`        | rank N: host, process, state, work       | its host's ranks, and all to report a failure        |
| `token`              | rank 0, at the start                     | all: one that reads another job's token exits        |
| `progress`           | touched by every rank that makes some    | all: the job hangs if nobody does for the timeout    |
| `cause.txt`          | the first that finds a failure's cause   | all: they exit with code 1                           |
| `refused.txt`        | the rank that found a mistake of a user  | all: they exit with code 2, rank 0 prints it         |
| `hanging`            | the first rank whose timeout is over     | all: they write what they do to `rank_N.stacks`      |

The second line of the last three names the job, so that a job started by mistake in the folder does not end the first one.
"""

import contextlib
import faulthandler
import os
import re
import secrets
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from smolds_dist.activity import ACTIVITY
from smolds_dist.errors import ConfigError
from smolds_dist.files import replace_text
from smolds_dist.inputs import Count, Positive, Time, convert, read_json
from smolds_dist.launching import hang
from smolds_dist.launching.state import write_state
from smolds_dist.parallel.control_groups import memory_events, out_of_memory, out_of_memory_kills
from smolds_dist.parallel.ranks import RankInfo, host_name, process_started, process_state, system_name
from smolds_dist.progress import print_line
from smolds_dist.settings import Parallel

TOKEN, CAUSE, REFUSED = "token", "cause.txt", "refused.txt"
SUSPENDED_SECONDS = 30.0  # between two looks, from which this process itself was suspended
SHARED_SECONDS = 5.0  # until a file of another host must be visible here
REFUSED_SECONDS = 2.0  # for the ranks that find the same mistake
LOST_CONTACT = re.compile(r"connection|peer|gloo|nccl|socket|timed? ?out|broken pipe|store", re.IGNORECASE)


def job_token() -> str:
    """Return a string that is the same on all ranks of a job and differs between jobs."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT")
    loopback = re.match(r"127\.|localhost|::1", os.environ.get("MASTER_ADDR", ""))
    alone = loopback and "SLURM_JOB_ID" not in os.environ  # another host's job may have the same address
    return ":".join([*(os.environ.get(name, "") for name in names), host_name() if alone else ""])


class RankReport:
    """This rank's entry, and the thread that watches the other ranks' entries.

    Args:
        settings: `grace`, seconds from another rank's death until this one exits forcibly, because collectives may never
            return; `timeout`, seconds without any rank's progress after which the job counts as hung.

    Raises:
        ConfigError: if another job is training in the folder on this host.
    """

    def __init__(self, run_dir: Path, info: RankInfo, settings: Parallel):
        self.folder = run_dir / "ranks"
        self.grace = settings.grace
        self.timeout = settings.timeout or float("inf")
        self.rank, self.world_size = info.rank, info.world_size
        self.token = ""  # of this start of the job, once known
        self._lock = threading.Lock()
        self._local_entries: list[Path] | None = None
        self._progress = self.folder / "progress"
        self._published = self._seen = time.monotonic()
        self._looked, self._last_mtime, self._tick = 0.0, 0, self._seen
        self.folder.mkdir(parents=True, exist_ok=True)
        self._refuse_second_job()
        self._dead_before = {(entry["rank"], entry["pid"]) for entry in rank_entries(self.folder) if _is_dead(entry)}
        for old in self.folder.glob(f"rank_{info.rank:05}.*"):
            old.unlink(missing_ok=True)
        self._remove_stale_files()
        self._fault_file = (self.folder / f"rank_{info.rank:05}.crash").open("w")
        faulthandler.enable(self._fault_file)  # records a segmentation fault
        events = memory_events()
        self.entry: dict[str, Any] = {
            "rank": info.rank, "host": host_name(), "pid": os.getpid(), "system": system_name(), "job": job_token(),
            "started": time.time(), "memory_events": events, "kills_before": out_of_memory_kills(events),
            "state": "running", "doing": str(ACTIVITY),
        }  # fmt: skip
        self._write()
        if info.world_size > 1:
            threading.Thread(target=self._watch, name="watch-ranks", daemon=True).start()

    def _refuse_second_job(self) -> None:
        for entry in rank_entries(self.folder, files=[self.folder / f"rank_{self.rank:05}.json"]):
            here = entry["system"] == system_name() and entry["pid"] != os.getpid()
            if entry["state"] == "running" and here and not _is_dead(entry):
                raise ConfigError(
                    f"{self.folder.parent} is in use by another training process; wait for its end, or choose another "
                    "--run.name."
                )

    def make_token(self) -> str:
        """Write and return a fresh random token, which only this start of the job knows. For rank 0."""
        token = secrets.token_hex(8)
        replace_text(self.folder / TOKEN, token)
        return token

    def has_token(self, token: str) -> bool:
        """Return True if the folder has rank 0's token, and so is shared with it."""
        deadline = time.monotonic() + SHARED_SECONDS
        while not (found := _read(self.folder / TOKEN) == token) and time.monotonic() < deadline:
            time.sleep(0.1)
        self.token = token if found else ""
        return found

    def _remove_stale_files(self) -> None:
        """Remove an earlier job's files, those older than this process. Every rank does, as each watches from the start."""
        begun = process_started()
        for name in (CAUSE, REFUSED, hang.HANG_MARKER, hang.STACKS):
            with contextlib.suppress(FileNotFoundError):
                if (self.folder / name).stat().st_mtime < begun:
                    (self.folder / name).unlink()

    def _write(self) -> None:
        name = f"rank_{self.rank:05}.json"
        with self._lock:  # so that the watching thread does not write an older state last
            if not write_state(self.folder, self.entry, name) and self.entry["state"] != "running":
                with contextlib.suppress(OSError):
                    (self.folder / name).unlink()  # the full disk still has it as running

    def end(self, state: str = "done", code: int = 0) -> None:
        """Record the rank's final state and exit code."""
        self.entry |= {"state": state, "code": code}
        self._write()
        faulthandler.enable()
        self._fault_file.close()

    def refuse(self, error: ConfigError) -> None:
        """Record a user's mistake, which ends all ranks with exit code 2."""
        _write_once(self.folder / REFUSED, str(error), self.entry["job"])
        self.end("refused", 2)

    def _end_refused(self) -> None:
        """End like the rank that found a user's mistake; rank 0 prints it, as it prints those that all ranks find."""
        self.end("refused", 2)
        if self.rank == 0:
            print_line(f"smolds: {_read(self.folder / REFUSED).splitlines()[0]}", sys.stderr)

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
                if self._is_ours(REFUSED):
                    self._end_refused()
                    return
                if self._report_dead_rank():
                    return
                time.sleep(0.2)
            gone = [e for e in self._entries() if e["state"] == "running" and e["system"] != system_name()]
            if gone:
                reason = last_line.partition(". ")[0][:200]  # gloo's has several sentences
                self._report(f"{one_of(gone)} was killed or lost its network ({reason})")
                return
        self._report(f"rank {self.rank} on host {self.entry['host']} failed: {last_line} (traceback: {log})")

    def local_entries(self) -> list[Path] | None:
        """Return the entries of this host's ranks, the only ones whose death is detectable here. None, meaning all, until
        every rank has written its entry for this start, which is certain after the first forward pass."""
        if self._local_entries is None and ACTIVITY.passes:
            entries = self._entries()
            if len(entries) == self.world_size:  # else a file was being replaced
                mine = [entry["rank"] for entry in entries if entry["system"] == system_name()]
                self._local_entries = [self.folder / f"rank_{rank:05}.json" for rank in mine]
        return self._local_entries

    def _entries(self, files: list[Path] | None = None) -> list[dict[str, Any]]:
        """Return the entries of this job's ranks, without those that an earlier job of the same name has left."""
        entries = rank_entries(self.folder, self.entry["job"], files)
        earlier = self._dead_before
        return [e for e in entries if e["rank"] < self.world_size and (e["rank"], e["pid"]) not in earlier]

    def _watch(self) -> None:
        while self.entry["state"] == "running":
            time.sleep(1)
            with contextlib.suppress(OSError):
                self._exchange_progress()
            idle = time.monotonic() - self._seen
            if idle > self.timeout or self._is_ours(hang.HANG_MARKER):
                _write_once(self.folder / hang.HANG_MARKER, f"rank {self.rank} saw no progress", self.entry["job"])
                entries = [entry for entry in self._entries() if entry["state"] == "running"]
                cause = hang.report_hang(self.folder, self.entry, entries, idle)
                if self.entry["state"] == "running":
                    self._report(cause)
                    hang.kill_unresponsive(self.folder, entries)
                    _exit(1)
            if self._is_ours(REFUSED) and self.entry["state"] == "running":
                time.sleep(REFUSED_SECONDS)
                if self.entry["state"] == "running":
                    self._end_refused()
                    _exit(2)
            if self._report_dead_rank():
                time.sleep(self.grace)
                if self.entry["state"] == "running":
                    _exit(1)

    def _exchange_progress(self) -> None:
        """Publish this rank's progress and work, and look for other ranks' progress. Exit if another start of the job has
        replaced this one while its host was cut off."""
        now, every = time.monotonic(), min(10.0, self.timeout / 10)
        if now - self._tick > SUSPENDED_SECONDS:
            self._seen = now
        self._tick = now
        if now - self._published >= every and ACTIVITY.makes_progress(self._published):
            self._published = self._seen = now
            self._progress.touch()  # last: the disk may be full
        if now - self._looked >= every:
            self._looked = now
            mtime = self._progress.stat().st_mtime_ns if self._progress.exists() else 0
            if mtime != self._last_mtime:
                self._last_mtime, self._seen = mtime, now
            if self.token and (token := _read(self.folder / TOKEN)) and token != self.token:
                _exit(1)
        if self.entry["doing"] != str(ACTIVITY):
            self.entry["doing"] = str(ACTIVITY)
            self._write()

    def _report_dead_rank(self) -> bool:
        """Report a rank of this host that died without an error; return True if the cause is known."""
        if self._is_ours(CAUSE):
            return True
        if cause := record_dead_rank(self.folder, self._entries(self.local_entries())):
            _log(cause)
        return bool(cause)

    def _is_ours(self, name: str) -> bool:
        """Return True if there is such a file of this job, or one without a job's name."""
        lines = _read(self.folder / name).splitlines()
        return bool(lines) and (len(lines) == 1 or lines[1] == self.entry["job"])

    def _report(self, cause: str) -> None:
        report_cause(self.folder, cause, self.entry["job"])


def record_dead_rank(folder: Path, entries: list[dict[str, Any]]) -> str:
    """Record a rank of this host that died without an error as the cause; return the cause, "" without a new one."""
    for entry in entries:
        if _died(entry, folder):
            crash = folder / f"rank_{entry['rank']:05}.crash"
            fault = crash.read_text(errors="replace").splitlines() if crash.exists() else []
            if fault:
                why = f"crashed: {fault[0]} (stack: {crash})"
            else:  # any other end leaves a trace
                why = "was killed by signal 9" + out_of_memory(entry["memory_events"], entry["kills_before"])
            cause = f"rank {entry['rank']} on host {entry['host']} {why}"
            return cause if _write_once(folder / CAUSE, cause, entry["job"]) else ""
    return ""


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


def exit_code_of_stop(folder: Path, entries: list[dict[str, Any]]) -> int | None:
    """Return the exit code of ranks stopped by a signal or a user's mistake; None if they ended in another way."""
    if (folder / REFUSED).exists() and any(entry["state"] == "refused" for entry in entries):
        return 2
    stopped = [entry["code"] for entry in entries if entry["state"] in ("stopped", "refused")]
    return stopped[0] if stopped and len(stopped) == len(entries) else None


def read_cause(folder: Path) -> str:
    """Return the cause of the failure in a `ranks` folder; "" if there is none."""
    return next(iter(_read(folder / CAUSE).splitlines()), "")


def _write_once(path: Path, text: str, job: str) -> bool:
    """Write a line and the job's name; return False if the file exists, also an empty one of a full disk."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(f"{' '.join(text.split())}\n{job}\n")
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def report_cause(folder: Path, cause: str, job: str) -> None:
    """Record the cause and print it, unless there is one already."""
    if _write_once(folder / CAUSE, cause, job):
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
    doing: str = ""
    job: str = ""
    memory_events: str = ""
    kills_before: Count = 0
    code: int = 0


def one_of(entries: list[dict[str, Any]]) -> str:
    """Name the rank or ranks of which one has failed. Several hosts are not named as `restarts.BLAMED` finds them, because
    one of them at most is to blame."""
    hosts = list(dict.fromkeys(entry["host"] for entry in entries))
    if len(hosts) > 1:
        return f"one of the hosts {', '.join(hosts[:8])}{', ...' if len(hosts) > 8 else ''}"
    word = "rank" if len(entries) == 1 else "one of the ranks"
    return f"{word} {', '.join(str(entry['rank']) for entry in entries)} on host {hosts[0]}"


def _read(path: Path) -> str:
    """Return a small file's text; "" if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _exit(code: int) -> NoReturn:
    sys.stderr.flush()
    os._exit(code)


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


def identity(entry: dict[str, Any]) -> tuple[int, int, float]:
    """Return what differs between two starts of a rank."""
    return entry["rank"], entry["pid"], entry["started"]


def _is_dead(entry: dict[str, Any]) -> bool:
    return entry["system"] == system_name() and process_state(entry["pid"]) in "ZX"


def _died(entry: dict[str, Any], folder: Path) -> bool:
    """Return True if a rank has ended without recording it."""
    if entry["state"] != "running" or not _is_dead(entry):
        return False
    now = rank_entries(folder, files=[folder / f"rank_{entry['rank']:05}.json"])  # it may have ended since it was read
    return bool(now) and (now[0]["state"], now[0]["pid"]) == ("running", entry["pid"])
