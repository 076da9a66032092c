"""Two hosts on this machine, for multi-node tests: each has its own network, host name, processes and sshd.

A host is a set of kernel namespaces, which also contain everything that would otherwise change this machine: the network
link, /etc/hosts, /etc/ssh/ssh_config and /run. All of it ends with the hosts' first process, also when the test process
itself is killed.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = "ip ssh sshd ssh-keygen nsenter unshare setpriv mount pgrep pkill".split()
ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMES = ("host1", "host2")
STARTUP_SECONDS = 20

# Runs as process 1 of a host. The link comes from outside; sshd needs an absolute path and a /run/sshd.
BOOT = """\
set -e
hostname {name}
mount -t tmpfs tmpfs /run
mount --bind {folder}/{name}.hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mkdir -m 755 /run/sshd
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip address add {address}/24 dev eth0
ip link set eth0 up
{sshd} -D -e -f {folder}/{name}.sshd_config 2>{folder}/{name}.sshd.log &
wait
"""

SSHD_CONFIG = """\
ListenAddress {address}:22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile none
"""

SSH_CONFIG = """\
Host *
    IdentityFile {folder}/key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


def available() -> str | None:
    """Return why two hosts cannot run here, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    trial = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "name", "trial", "type", "veth"], capture_output=True, text=True
    )
    return f"this kernel has no virtual links: {trial.stderr.strip()}" if trial.returncode else None


@dataclass(frozen=True)
class Hosts:
    """Both running hosts. They share this machine's files, except /run, and can reach only each other."""

    pids: tuple[int, ...]  # each host's process 1
    addresses: tuple[str, ...] = ADDRESSES
    names: tuple[str, ...] = NAMES
    environment: dict[str, str] = field(default_factory=lambda: {"PDSH_RCMD_TYPE": "ssh"})

    def command(self, host: int, argv: list[str]) -> list[str]:
        """Return the command that runs `argv` on a host, in the caller's working directory and environment."""
        enter = f"exec nsenter --target {self.pids[host]} --mount --uts --ipc --net --pid"
        # Entering a mount namespace leads to /, hence --chdir
        return ["sh", "-c", f'{enter} -- env --chdir="$PWD" "$@"', "sh", *argv]


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Start both hosts; yield them once each can reach the other by ssh."""
    folder = folder.resolve()
    _configure(folder)
    with ExitStack() as stack:
        hosts = Hosts(tuple(stack.enter_context(_host(folder, name)) for name in NAMES))
        link = ["ip", "link", "add", "eth0", "netns", str(hosts.pids[0]), "type", "veth"]
        subprocess.run([*link, "peer", "name", "eth0", "netns", str(hosts.pids[1])], check=True)
        for host, other in ((0, 1), (1, 0)):
            _wait_for_ssh(hosts.command(host, ["ssh", "-o", "ConnectTimeout=2", NAMES[other], "true"]), folder)
        yield hosts


def _configure(folder: Path) -> None:
    """Write keys, and the hosts' replacements of this machine's configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    for key in ("key", "host_key"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(folder / key)]
        subprocess.run(keygen, check=True, stdin=subprocess.DEVNULL)
    (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
    known = "".join(f"{address} {name}\n" for address, name in zip(ADDRESSES, NAMES, strict=True))
    sshd = shutil.which("sshd")
    for address, name in zip(ADDRESSES, NAMES, strict=True):
        (folder / f"{name}.hosts").write_text(f"127.0.0.1 localhost\n::1 localhost\n{known}")
        (folder / f"{name}.sshd_config").write_text(SSHD_CONFIG.format(address=address, folder=folder))
        (folder / f"{name}.sh").write_text(BOOT.format(name=name, address=address, folder=folder, sshd=sshd))


@contextmanager
def _host(folder: Path, name: str) -> Iterator[int]:
    """Start a host without its link; yield the process id of its process 1 on this machine."""
    with (folder / f"{name}.log").open("wb") as log:
        outer = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork",
             "--kill-child", "--mount-proc", "sh", str(folder / f"{name}.sh")],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + STARTUP_SECONDS
        while not (child := subprocess.run(["pgrep", "-P", str(outer.pid)], capture_output=True, text=True).stdout):
            if outer.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{name} did not start: {(folder / f'{name}.log').read_text()}")
            time.sleep(0.02)
        yield int(child)
    finally:
        # Killing process 1 first makes `unshare` return when the whole namespace is gone, rather than before.
        subprocess.run(["pkill", "-KILL", "-P", str(outer.pid)], check=False)
        try:
            outer.wait(10)
        finally:
            outer.kill()


def _wait_for_ssh(command: list[str], folder: Path) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while (answer := subprocess.run(command, capture_output=True, text=True, timeout=STARTUP_SECONDS)).returncode:
        if time.monotonic() > deadline:
            logs = [
                f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in sorted(folder.glob("*.log"))
            ]
            raise AssertionError("\n".join([f"no ssh after {STARTUP_SECONDS} s: {answer.stderr}", *logs]))
        time.sleep(0.1)
