"""Run a launcher and show its ranks' output without what the launcher itself prints after a failure."""

import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable

from smolds_dist.launching.signals import handled_by
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
) -> tuple[int, str]:
    """Run `command`; return its exit code (-N if signal N ended it) and the text of the last `smolds: ` line.

    Standard output passes unchanged. The launcher's own lines on standard error go to `hidden`. Stop signals go to
    `forward_signal`; the launcher runs in its own session, so that the terminal does not signal it.
    """
    if sys.stderr.isatty():
        # Keep a terminal for the ranks' progress bar.
        reading, writing = os.openpty()
        termios.tcsetwinsize(writing, termios.tcgetwinsize(sys.stderr.fileno()))
    else:
        reading, writing = os.pipe()
    process = subprocess.Popen(
        command, env=environment, stderr=writing, start_new_session=True, preexec_fn=_die_with_parent
    )
    os.close(writing)
    try:
        with handled_by(lambda number, _frame: forward_signal(process, number)):
            message = _forward_output(reading, process, hidden)
            return process.wait(), message
    finally:
        os.close(reading)


def _die_with_parent() -> None:
    """Have the kernel send the launcher SIGTERM if this process is killed, so that no ranks stay behind (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _forward_output(reading: int, process: subprocess.Popen, hidden: list[str]) -> str:
    noise, rest = NoiseFilter(), ""
    while True:
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
            if noise.is_noise(line.rpartition("\r")[2] if line.startswith("\r") else line):
                hidden.append(line)
            else:
                print_line(line, sys.stderr, end="")
    if rest:
        print_line(rest, sys.stderr, end="")
    return noise.last_message
