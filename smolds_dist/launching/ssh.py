"""ssh to the hosts of a hostfile."""

import os
import shlex
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

# Never ask for a password, and end if the host does not answer: without ServerAlive, ssh never notices a dead link.
OPTIONS = {"BatchMode": "yes", "ConnectTimeout": "5", "ServerAliveInterval": "15", "ServerAliveCountMax": "3"}
PDSH_VARIABLE = "PDSH_SSH_ARGS_APPEND"  # the user's own options for ssh, such as `-p 2222`
SECONDS = 20.0  # for one command on all hosts


def ssh_options() -> list[str]:
    """Return the options of every ssh; the user's precede, because ssh uses the first value of an option."""
    return [*shlex.split(os.environ.get(PDSH_VARIABLE, "")), *(f"-o{name}={value}" for name, value in OPTIONS.items())]


def ssh_command(host: str, command: str) -> list[str]:
    """Return the command line that runs a shell command on a host."""
    return ["ssh", *ssh_options(), host, command]


def run_on_hosts(commands: dict[str, str], seconds: float = SECONDS) -> dict[str, str]:
    """Run a shell command on each host, simultaneously; return the last line of ssh's output for those where it failed."""

    def run(host: str) -> str | None:
        try:
            done = subprocess.run(
                ssh_command(host, commands[host]), stdin=subprocess.DEVNULL, capture_output=True, text=True,
                errors="replace", timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"no answer in {seconds:.0f} s"
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        return None if done.returncode == 0 else lines[-1].rstrip(".") if lines else f"exit code {done.returncode}"

    with ThreadPoolExecutor(min(64, len(commands)) or 1) as pool:
        return {host: text for host, text in zip(commands, pool.map(run, commands), strict=True) if text is not None}


def read_files(host: str, paths: Iterable[str]) -> str:
    """Return the text of all of these files of a host that exist; "" if it does not answer."""
    try:
        command = ssh_command(host, f"cat {shlex.join(paths)}")
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=SECONDS
        ).stdout
    except subprocess.TimeoutExpired:
        return ""


def unreachable(hosts: Iterable[str]) -> dict[str, str]:
    """Return the hosts that do not answer, with ssh's reason."""
    return run_on_hosts(dict.fromkeys(hosts, "true"))
