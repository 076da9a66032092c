"""Runs a launcher and shows what its ranks print, without what the launcher itself adds when they end badly."""

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

# Log lines of torchrun, deepspeed, srun and mpirun. Ranks never print such.
NOISE = re.compile(
    r"([WEI]\d{4} \d\d:\d\d|\[\d{4}-\d\d-\d\d .*\] \[(INFO|WARNING|ERROR)\] \[|srun: |slurmstepd: |mpirun: |pdsh@|\[W\d+ |"
    r"\d+ total processes killed|Setting OMP_NUM_THREADS|\[[\w.-]+:\d+\] )"
)
HOST = re.compile(r"^[\w.-]+: (?=smolds: |\[|[WEI]\d|Traceback|[=*-]{20})")  # pdsh's mark
RULE = re.compile(r"([-=*])\1{19,}$")


class NoiseFilter:
    """Tells a launcher's own lines: logs, tracebacks, and blocks between rules of -, = or *."""

    def __init__(self) -> None:
        self.last_message = ""  # what a rank has said last, most likely why the job ends
        self.rule = ""
        self.in_traceback = False

    def is_noise(self, line: str) -> bool:
        line = HOST.sub("", line.strip("\r\n"))
        if self.rule:
            if line.startswith(self.rule * 20):
                self.rule = ""
            return True
        # A rule may stand behind a progress bar, whose line has no end.
        if match := RULE.search(line):
            self.rule = match.group(1)
            return True
        if line.startswith("smolds: "):
            self.last_message = line.removeprefix("smolds: ")
            return False
        if self.in_traceback:
            self.in_traceback = line.startswith((" ", "Traceback")) or not line
            return True  # also the error's own line, which ends it
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
    """Runs `command`; returns its exit code, -N where signal N ended it, and what the last line of smolds' own said.

    Standard output passes untouched. Lines of standard error that are the launcher's go to `hidden`. Signals that ask this
    process to stop go to `forward_signal`; the launcher has a session of its own and does not get the terminal's.
    """
    if sys.stderr.isatty():
        # The ranks' progress bar should go on seeing a terminal.
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
    """Has the kernel send the launcher SIGTERM, should this process be killed: no ranks are left behind (Linux)."""
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
                print_line(rest, sys.stderr, end="")  # a progress bar's line has no end
                rest = ""
            continue
        try:
            data = os.read(reading, 65536)
        except OSError:  # a terminal's way to say that the other side is closed
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
