"""Run a launcher and show its ranks' output without what the launcher itself prints after a failure."""

import contextlib
import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from smolds_dist.launching.failure import (
    CAUSE,
    exit_code_of_stop,
    identity,
    kill_ranks,
    rank_entries,
    read_cause,
    record_dead_rank,
    signal_ranks,
)
from smolds_dist.launching.hosts import HostWatch
from smolds_dist.launching.signals import EXIT_CODES, handled_by
from smolds_dist.parallel.control_groups import memory_events, out_of_memory, out_of_memory_kills
from smolds_dist.progress import print_line

# Log lines of torchrun, deepspeed, srun and mpirun; ranks never print these.
NOISE = re.compile(
    r"([WEI]\d{4} \d\d:\d\d|\[\d{4}-\d\d-\d\d .*\] \[(INFO|WARNING|ERROR)\] \[|srun: |slurmstepd: |mpirun: |pdsh@|\[W\d+ |"
    r"\d+ total processes killed|Setting OMP_NUM_THREADS|\[[\w.-]+:\d+\] )"
)
HOST = re.compile(r"^[\w.-]+: (?=smolds: |\[|[WEI]\d|Traceback|[=*-]{20})")  # pdsh's prefix
RULE = re.compile(r"([-=*])\1{19,}$")


class NoiseFilter:
    """Recognizes a launcher's own lines: logs, tracebacks, and blocks between rules of -, = or *."""

    def __init__(self) -> None:
        self.last_message = ""  # the ranks' last message, most likely why the job ends
        self.rule = ""
        self.in_traceback = False

    def is_noise(self, line: str) -> bool:
        line = HOST.sub("", line.strip("\r\n"))
        if self.rule:
            if line.startswith(self.rule * 20):
                self.rule = ""
            return True
        # A rule may follow a progress bar, which has no newline.
        if match := RULE.search(line):
            self.rule = match.group(1)
            return True
        if line.startswith("smolds: "):
            self.last_message = line.removeprefix("smolds: ")
            return False
        if self.in_traceback:
            self.in_traceback = line.startswith((" ", "Traceback")) or not line
            return True  # including the error's own line, which ends it
        if line.startswith("Traceback (most recent call last)"):
            self.in_traceback = True
            return True
        return bool(NOISE.match(line))


def run_filtered(
    command: list[str],
    environment: dict[str, str],
    hidden: list[str],
    forward_signal: Callable[[subprocess.Popen, int], None],
    watch: HostWatch | None = None,
) -> tuple[int, str]:
    """Run `command`; return its exit code (-N if signal N ended it) and the text of the last `smolds: ` line.

    The launcher's own lines go to `hidden`: on standard error, and of several hosts also on standard output, where
    DeepSpeed logs. Stop signals go to `forward_signal`; the launcher runs in its own session, so that the terminal does not
    signal it.
    """
    if sys.stderr.isatty():
        # Keep a terminal for the ranks' progress bar.
        reading, writing = os.openpty()
        termios.tcsetwinsize(writing, termios.tcgetwinsize(sys.stderr.fileno()))
    else:
        reading, writing = os.pipe()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE if watch else None, stderr=writing, text=True, errors="replace",
        start_new_session=True, preexec_fn=die_with_parent,
    )  # fmt: skip
    os.close(writing)
    copying = threading.Thread(
        target=_copy_output, args=(process.stdout or (), hidden), name="copy-output", daemon=True
    )
    copying.start()
    try:
        with handled_by(lambda number, _frame: forward_signal(process, number)):
            message = _forward_output(reading, process, hidden, watch)
            code = process.wait()
            copying.join(5)  # ranks that outlive the launcher may keep it open
            return code, message
    finally:
        os.close(reading)


def die_with_parent() -> None:
    """Have the kernel send the launcher SIGTERM if this process is killed, so that no ranks stay behind (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _copy_output(lines: Iterable[str], hidden: list[str]) -> None:
    for line in lines:
        if NOISE.match(HOST.sub("", line)):
            hidden.append(line)
        else:
            print_line(line, sys.stdout, end="")


def _forward_output(reading: int, process: subprocess.Popen, hidden: list[str], watch: HostWatch | None) -> str:
    noise, rest = NoiseFilter(), ""
    while True:
        if watch:
            watch.tick(process)
        ready, _, _ = select.select([reading], [], [], 0.2)
        if not ready:
            if process.poll() is not None:
                break
            if rest and not noise.in_traceback and not noise.rule and not NOISE.match(rest.lstrip("\r")):
                print_line(rest, sys.stderr, end="")  # a progress bar has no newline
                rest = ""
            continue
        try:
            data = os.read(reading, 65536)
        except OSError:  # a terminal closed at the other end
            data = b""
        if not data:
            break
        *lines, rest = re.split(r"(?<=\n)", rest + data.decode(errors="replace"))
        for line in lines:
            is_noise = noise.is_noise(line.rpartition("\r")[2] if line.startswith("\r") else line)
            if watch:
                watch.read(line, is_noise)
            if is_noise:
                hidden.append(line)
            else:
                print_line(line, sys.stderr, end="")
    if rest:
        print_line(rest, sys.stderr, end="")
    return noise.last_message


def run_single(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run one process, forwarding signals; return its exit code and, if it failed, the cause."""
    events = memory_events()
    kills = out_of_memory_kills(events)
    process = subprocess.Popen(command, env=environment)

    def forward_signal(number: int, _frame: object) -> None:
        if number != signal.SIGINT:  # a terminal sends it to both
            process.send_signal(number)

    with handled_by(forward_signal):
        code = process.wait()
    if code >= 0:
        return code, f"the process ended with exit code {code}"
    cause = f"the process was killed by signal {-code}{out_of_memory(events, kills)}"
    print_line(f"\nsmolds: {cause}.", sys.stderr)
    return 128 - code, cause


def _killed_task(text: str) -> str:
    """Return the cause that srun prints, "" if it prints none: it may end all ranks before one has recorded another's."""
    killed = re.search(r"srun: error: (\S+): tasks? (\d+)\S*: Killed", text)
    return f"rank {killed[2]} on host {killed[1]} was killed by signal 9" if killed else ""


def run_ranks(
    command: list[str], environment: dict[str, str], run_dir: Path, remote: bool, watch: HostWatch | None = None
) -> tuple[int, str]:
    """Run the launcher, forward signals to the ranks, and print one line if they failed.

    Args:
        remote: the launcher forwards signals to the ranks.

    Returns:
        The exit code and, if they failed, the cause.
    """
    began, events = time.time(), memory_events()
    kills = out_of_memory_kills(events)
    ranks = run_dir / "ranks"
    earlier = {identity(entry) for entry in rank_entries(ranks)}  # not by time: other hosts' clocks may differ
    hidden: list[str] = []
    asked: list[int] = []

    def forward_signal(process: subprocess.Popen, number: int) -> None:
        asked.append(number)
        if watch:
            watch.stop_looking()
        # torchrun and deepspeed would kill the ranks before they save a checkpoint.
        if remote or not (signal_ranks(ranks, number, began) or (watch and watch.signal_ranks(number))):
            process.send_signal(number)

    code, message = run_filtered(command, environment, hidden, forward_signal, watch)
    if code == 0 and not (watch and watch.unfinished()):
        return 0, ""
    entries = [entry for entry in rank_entries(ranks) if identity(entry) not in earlier]
    stopped = exit_code_of_stop(ranks, entries)
    if stopped is not None:
        return stopped, ""
    if watch and watch.has_lost_host():
        watch.report()  # mpirun has then killed the ranks here
    # Ranks record the cause unless they were killed.
    found = record_dead_rank(ranks, [entry for entry in rank_entries(ranks) if entry["started"] >= began])
    if watch:
        watch.report()
        watch.kill_ranks()
        code = 2 if watch.rejected else 1 if watch.reported else code  # not ssh's
    noted = ranks / CAUSE
    known = noted.exists() and noted.stat().st_mtime >= began - 1
    cause = (read_cause(ranks) if known else "") or _killed_task("".join(hidden))
    memory = out_of_memory(events, kills)
    if not cause and not message and (found or memory):
        cause = found or f"a rank was killed before it had started{memory}"  # and could write its entry
    kill_ranks(ranks, began)
    if asked and not cause and not message:  # before the ranks could handle the signal
        return EXIT_CODES[signal.Signals(asked[0])], ""
    with contextlib.suppress(OSError):  # of a full disk
        (ranks / "launcher.log").write_text("".join(hidden), encoding="utf-8")
    code = code or 1
    how = f"the ranks ended with exit code {code}" if code > 0 else f"the launcher was killed by signal {-code}"
    if code != 2 and not message and not (watch and watch.reported):
        last_line = next((line.strip() for line in reversed(hidden) if line.strip(" \n=-")), "nothing")
        last = f"{how}; last output: {last_line}"
        print_line(f"\nsmolds: {f'{cause}; the other ranks stop.' if cause else last}", sys.stderr)
    code = code if code > 0 else 128 - code
    if code in EXIT_CODES.values() and not asked:
        code = 1  # srun returns the highest code of all ranks, including those it signaled after another failed
    return code, cause or message.rstrip(".") or how
