"""Hosts of a hostfile: which answer, and which are lost while ranks run on them.

Ranks there write the same files as on one machine, to the run's folder, which all hosts share. Only the launcher can see
that a host's ssh has ended, and it must end itself when all ranks that it can reach have ended.
"""

import contextlib
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from smolds_dist.errors import ConfigError
from smolds_dist.inputs import printable, read_text
from smolds_dist.launching.failure import CAUSE, SHARED_SECONDS, identity, one_of, rank_entries, report_cause
from smolds_dist.launching.plan import Plan
from smolds_dist.launching.signals import blocked
from smolds_dist.launching.ssh import read_files, run_on_hosts, unreachable
from smolds_dist.parallel.control_groups import describe_memory
from smolds_dist.parallel.ranks import system_name
from smolds_dist.progress import print_line

MAX_PAUSE = 60.0  # seconds between attempts to reach a host
LOOK_EVERY = 30.0  # seconds between attempts to reach missing hosts while ranks run
EXIT_SECONDS = 10.0  # in which ranks exit after the cause is known and `grace` has passed
SSH_ENDED = re.compile(r"pdsh@[\w.-]+: ([\w.-]+): ssh exited with exit code (\d+)")
LABEL = re.compile(r"([\w.-]+): (.*\S)")  # pdsh's prefix of a host's output
MPI_LOST = re.compile(r"ORTE (was unable to reliably start|has lost communication)")  # of Open MPI 4, without the host
UNREACHABLE = 255  # ssh's own exit code


def read_hostfile(path: Path) -> dict[str, int]:
    """Read the slots per host from a DeepSpeed or Open MPI hostfile (lines `host slots=N`)."""
    hosts: dict[str, int] = {}
    for number, line in enumerate(read_text(path, "write a line `host slots=N` for each host").splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"([\w.@:-]+)\s+slots=(\d+)", line)
        if not match or int(match.group(2)) < 1:
            raise ConfigError(f"{path}, line {number} is {line!r}; write it as `host slots=N`.")
        if match.group(1) in hosts:
            raise ConfigError(f"{path}, line {number} names {match.group(1)} again; name each host once.")
        hosts[match.group(1)] = int(match.group(2))
    if not hosts:
        raise ConfigError(f"{path} lists no host; write a line `host slots=N` for each.")
    return hosts


def check_hosts(hosts: Sequence[str], hostfile: Path) -> None:
    """Raise a `ConfigError` that names the hosts that do not answer."""
    if missing := unreachable(hosts):
        raise ConfigError(
            f"{hostfile} lists hosts that do not answer: {_reasons(missing)}; make `ssh HOST true` work without a password, "
            "or remove them."
        )


def wait_for_hosts(
    hosts: Sequence[str], choose: Callable[[list[str]], Plan | None], log: Callable[[str], None]
) -> Plan | int:
    """Wait until enough hosts answer for a restart.

    Args:
        choose: returns what to start on hosts that answer, None if they are not enough.

    Returns:
        What `choose` has returned, or the exit code of a stop signal that ended the wait.
    """
    with blocked() as wait:
        pause = 1.0
        while True:
            missing = unreachable(hosts)
            if (chosen := choose([host for host in hosts if host not in missing])) is not None:
                return chosen
            if pause == 1.0:
                log(f"the restart waits for {_reasons(missing)}; Ctrl-C ends the wait.")
            if stopped := wait(pause):
                return stopped
            pause = min(MAX_PAUSE, 2 * pause)


def _reasons(missing: dict[str, str]) -> str:
    named = [f"{host} ({printable(reason)})" for host, reason in list(missing.items())[:8]]
    return ", ".join(named) + (f" and {len(missing) - 8} others" if len(missing) > 8 else "")


class HostWatch:
    """Watches one start of a job: ends it if a host is lost, and looks for hosts to grow to.

    Args:
        folder: `RUN/ranks`.
        plan: what was started; its hosts are in the order of their ranks.
        mark: text in the command line of the ranks of this run only.
        grace: seconds in which ranks report and exit by themselves.
        missing: hosts to look for.
        choose: returns the plan for a restart on these hosts, None if there is none.
    """

    def __init__(
        self, folder: Path, plan: Plan, mark: str, grace: float, missing: Sequence[str] = (),
        choose: Callable[[list[str]], Plan | None] = lambda answering: None,
    ):  # fmt: skip
        self.folder, self.hosts, self.per_node, self.mark, self.grace = folder, plan.hosts, plan.per_node, mark, grace
        self.missing, self.choose = missing, choose
        self.grows = False  # the ranks were asked to stop, for a restart on more hosts
        self.reported = False  # the cause was printed here
        self._earlier = {identity(entry) for entry in rank_entries(folder)}
        self._earlier_cause = self._cause_time()
        self._mpi_lost = False
        self._ended: dict[str, int] = {}  # exit codes of failed ssh connections, the first one first
        self._last_lines: dict[str, str] = {}
        self._failed_at: float | None = None
        self._looked_at = time.monotonic()
        self._looking: threading.Thread | None = None

    def read(self, line: str, is_noise: bool = False) -> None:
        """Note a line that pdsh, ssh or mpirun printed, or a host's last one except log lines (`is_noise`)."""
        if match := SSH_ENDED.search(line):
            if host := self._host(match.group(1)):
                self._ended.setdefault(host, int(match.group(2)))
        elif MPI_LOST.search(line):
            self._mpi_lost = True
        elif not is_noise and (match := LABEL.match(line)) and (host := self._host(match.group(1))):
            self._last_lines[host] = match.group(2)

    def _host(self, label: str) -> str | None:
        """Return the host that pdsh's label, without user and possibly without domain, stands for."""
        names = {host: host.rpartition("@")[2] for host in self.hosts}
        return next((host for host, name in names.items() if label in (name, name.partition(".")[0])), None)

    def entries(self) -> dict[str, list[dict[str, Any]]]:
        """Return the entries of this start's ranks by host."""
        found: dict[str, list[dict[str, Any]]] = {host: [] for host in self.hosts}
        for entry in rank_entries(self.folder):
            index = entry["rank"] // self.per_node
            if index < len(self.hosts) and identity(entry) not in self._earlier:
                found[self.hosts[index]].append(entry)
        return found

    def tick(self, process: subprocess.Popen) -> None:
        """End the job if its failure is known and time for the ranks to exit has passed; called several times a second."""
        self._look_for_missing()
        if self._failed_at is None:
            if not self.rejected and not self.cause() and self._cause_time() == self._earlier_cause:
                return
            self._failed_at = time.monotonic()
        waited = time.monotonic() - self._failed_at
        if waited > self.grace:
            self.report()
        if waited > (self.grace if self.rejected else 2 * self.grace + EXIT_SECONDS):
            for one in [process, *psutil.Process(process.pid).children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):  # a parent may exit with code 0
                    one.kill()

    @property
    def rejected(self) -> bool:
        """Return True if a rank has found a mistake of the user; ranks on other hosts may wait for it."""
        return 2 in self._ended.values()

    def unfinished(self) -> bool:
        """Return True if ranks still run after the launcher has ended: DeepSpeed's exit code is 0 if pdsh was killed."""
        deadline = time.monotonic() + SHARED_SECONDS
        while running := any(entry["state"] == "running" for some in self.entries().values() for entry in some):
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        return running

    def _cause_time(self) -> int:
        with contextlib.suppress(OSError):
            return (self.folder / CAUSE).stat().st_mtime_ns
        return 0

    def has_lost_host(self) -> bool:
        """Return True if the connection to a host was lost; to be called after the end of the job."""
        if self._mpi_lost and not self._ended:
            entries = self.entries().items()
            remote = [host for host, some in entries if any(entry["system"] != system_name() for entry in some)]
            lost = [*unreachable(self.hosts)] or (remote if len(remote) == 1 else [])  # the host may be back
            self._ended |= dict.fromkeys(lost, UNREACHABLE)
        return UNREACHABLE in self._ended.values()

    def started(self) -> bool:
        """Return True unless ssh ended before any rank of its host had started."""
        entries = self.entries()
        return all(entries[host] for host in self._ended)

    def cause(self, ask: bool = False) -> str:
        """Return the failure of the first host whose ssh ended, "" without one, or if its ranks have reported it.

        Args:
            ask: ask the host whether its memory was the reason.
        """
        by_host = self.entries() if self._ended else {}
        for host, code in self._ended.items():
            entries = by_host[host]
            line = printable(self._last_lines.get(host, "")).rstrip(".")
            reason = f"ssh ended with exit code {code}" + (f": {line}" if line else "")
            if not entries and not (code == 2 and line.startswith("smolds: ")):
                fix = "install smolds and Python at the same paths as here"
                return f"host {host} did not start its ranks ({reason}); {fix}"
            if running := [entry for entry in entries if entry["state"] == "running"]:
                memory = _out_of_memory(host, running[0]) if ask else ""
                return f"{one_of(running)} was killed or lost its network{memory} ({reason})"
        return ""

    def report(self) -> None:
        """Record and print a lost host as the cause, which ends the other ranks, unless a cause is known."""
        if self._cause_time() == self._earlier_cause and (cause := self.cause(ask=True)):
            (self.folder / CAUSE).unlink(missing_ok=True)  # an earlier job's
            self.folder.mkdir(parents=True, exist_ok=True)
            jobs = [entry["job"] for some in self.entries().values() for entry in some]
            report_cause(self.folder, cause, jobs[0] if jobs else "")
            self.reported = True

    def signal_ranks(self, number: int) -> bool:
        """Send a signal to the running ranks of all hosts; return True if there are any."""
        commands = {}
        for host, entries in self.entries().items():
            if pids := [str(entry["pid"]) for entry in entries if entry["state"] == "running"]:
                # The pids are valid on the same boot of the host.
                system = 'test "$(cat /proc/sys/kernel/random/boot_id)$(readlink /proc/self/ns/pid)" = '
                kill = " ".join(["kill", f"-{int(number)}", *pids])
                commands[host] = _sh(f"{system}{shlex.quote(entries[0]['system'])} && {kill}")
        threading.Thread(target=run_on_hosts, args=(commands,), name="signal-hosts", daemon=True).start()
        return bool(commands)

    def stop_looking(self) -> None:
        """Look for no hosts any more, because the user stops the job."""
        self.missing, self.grows = (), False

    def kill_ranks(self) -> None:
        """Kill what is left of the job on all hosts that can be reached."""
        run_on_hosts({host: kill_command(self.mark) for host in self.hosts if self._ended.get(host) != UNREACHABLE})

    def _look_for_missing(self) -> None:
        """Look in the background for missing hosts; if enough answer, ask the ranks to save and stop."""
        if not self.missing or self.grows or time.monotonic() - self._looked_at < LOOK_EVERY:
            return
        if self._looking is None or not self._looking.is_alive():
            self._looked_at = time.monotonic()
            self._looking = threading.Thread(target=self._look, name="look-for-hosts", daemon=True)
            self._looking.start()

    def _look(self) -> None:
        absent = unreachable(self.missing)
        found = [host for host in self.missing if host not in absent]
        larger = self.choose([*self.hosts, *found])
        if self.missing and larger and len(larger.hosts) > len(self.hosts) and self.signal_ranks(signal.SIGUSR1):
            self.grows = True
            text = f"{', '.join(found)} answers again; the ranks save and restart on {len(larger.hosts)} hosts."
            print_line(f"\nsmolds: {text}", sys.stderr)


def _out_of_memory(host: str, entry: dict[str, Any]) -> str:
    """Return the end of a message about a rank of another host, "" unless the kernel there has killed it for memory."""
    events = Path(entry.get("memory_events", ""))
    limits = [str(events.parent / name) for name in ("memory.max", "memory.limit_in_bytes")]
    text = read_files(host, [str(events), *limits])
    kills = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    if not kills or int(kills.group(1)) <= entry.get("kills_before", 0):
        return ""
    found = [int(line) for line in re.findall(r"^\d+$", text, re.MULTILINE)]
    return describe_memory(min((limit for limit in found if limit < 2**60), default=None))


def kill_command(mark: str) -> str:
    """Return a shell command that kills all processes with this text in their command line, and succeeds if none has."""
    return _sh(f"pkill -KILL -f -- {shlex.quote('[' + mark[0] + ']' + re.escape(mark[1:1000]))} || true")


def _sh(command: str) -> str:
    return f"sh -c {shlex.quote(command)}"  # for hosts with another login shell
