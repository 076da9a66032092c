"""Hosts on this machine, for multi-node tests: each has its own network link, name, processes, sshd and mounts.

    with cluster(tmp_path / "hosts", hosts=3) as hosts:
        hostfile = hosts.hostfile()
        job = subprocess.Popen(hosts.command(0, ["smolds", "launch", "--hostfile", str(hostfile), ...]))
        hosts.link(2, up=False)

A host is a set of kernel namespaces. Their links meet on a bridge in a namespace of its own, so nothing of this machine
changes. All of it ends with the hosts' first processes, also when the test process itself is killed. The hosts share this
machine's files except /run, /dev/shm and what `mount` and `hide` replace, and can reach only each other.
"""

import atexit
import functools
import os
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import packet_filter
import pytest
import warm

HERE = Path(__file__).parent
PROGRAMS = "gcc ip pdsh ssh sshd ssh-keygen nsenter unshare setpriv mount pgrep pkill".split()
STARTUP_SECONDS = 20
FAULTS = struct.Struct("ld4096s")  # `settings` in host_faults.c
MEMORY_GROUPS = Path("/sys/fs/cgroup/memory" if Path("/sys/fs/cgroup/memory").is_dir() else "/sys/fs/cgroup")

# Runs as process 1 of a host. sshd needs an absolute path and a /run/sshd.
BOOT = """\
set -e
hostname {name}
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mkdir -m 755 /run/sshd /run/empty
. {folder}/{name}.mounts
ip link set lo up
{sshd} -D -e -f {folder}/{name}.sshd_config 2>>{folder}/{name}.sshd.log &
echo started
exec >/dev/null
wait
"""

SSHD_CONFIG = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile none
MaxStartups 100
SetEnv {environment}
"""

SSH_CONFIG = """\
Host *
    IdentityFile {folder}/key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""

BRIDGE = (
    "ip link add bridge type bridge forward_delay 0 && ip link set bridge up && echo started && exec sleep infinity"
)
ALONE = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net"]


def available() -> str | None:
    """Return why no hosts can run here, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    trial = ["unshare", "--net", "sh", "-c", "ip link add trial type veth && ip link add bridge type bridge"]
    result = subprocess.run(trial, capture_output=True, text=True)
    return f"this kernel has no virtual links: {result.stderr.strip()}" if result.returncode else None


needs_hosts = pytest.mark.skipif(bool(available()), reason=str(available()))


@dataclass
class Host:
    """One host, which `stop` and `start` power off and on with its settings kept."""

    name: str
    address: str
    process: subprocess.Popen | None = None  # the parent of its process 1
    pid: int = 0  # of its process 1
    filters: dict[tuple[str, int], bytes] = field(default_factory=dict)  # programs by purpose and hook of its link
    files: dict[tuple[str, int], int] = field(default_factory=dict)  # the attached ones


@dataclass
class Cluster:
    """Running hosts, numbered from 0. Call the methods that start hosts from the thread that made the cluster: hosts end
    with it."""

    folder: Path
    hosts: list[Host]
    preload: str = ""  # the library with faults of clock and disk
    bridge: int = 0  # the process that holds the bridge's namespace
    environment: dict[str, str] = field(default_factory=lambda: {"PDSH_RCMD_TYPE": "ssh"})

    @property
    def names(self) -> list[str]:
        return [host.name for host in self.hosts]

    @property
    def addresses(self) -> list[str]:
        return [host.address for host in self.hosts]

    def hostfile(self, slots: int = 1) -> Path:
        """Write a hostfile with all hosts; return its path."""
        path = self.folder / "hostfile"
        path.write_text("".join(f"{name} slots={slots}\n" for name in self.names))
        return path

    def command(self, host: int, argv: list[str]) -> list[str]:
        """Return the command that runs `argv` on a host, in the caller's working directory and environment."""
        procs = _memory_group(self.hosts[host]) / "cgroup.procs"
        enter = f"nsenter --target {self.hosts[host].pid} --mount --uts --ipc --net --pid"
        enter += " -- setpriv --pdeathsig KILL"  # ends with the returned command
        # Entering a mount namespace leads to /, hence --chdir
        shell = f'test ! -e {procs} || echo $$ >{procs}; exec {enter} env --chdir="$PWD" "$@"'
        faults = [f"{name}={value}" for name, value in self._faults(self.hosts[host]).items()]
        return ["sh", "-c", shell, "sh", *faults, *argv]

    def python(self) -> str:
        """Return the Python for the hosts that has imported everything; `sys.executable` for a normal start."""
        return warm.python(self.preload)

    def call(self, host: int, *argv: str) -> str:
        """Run a short command on a host; return its output."""
        done = subprocess.run(self.command(host, list(argv)), capture_output=True, text=True, timeout=STARTUP_SECONDS)
        assert done.returncode == 0, f"{argv} on {self.names[host]}: {done.stderr}"
        return done.stdout

    def mount(self, host: int, source: Path, target: Path) -> None:
        """Show the file or folder `source` at `target` on this host, also to running processes and after a reboot."""
        line = f"mount --bind '{source}' '{target}'\n"
        self.call(host, "sh", "-c", line)
        with (self.folder / f"{self.names[host]}.mounts").open("a") as file:
            file.write(line)

    def hide(self, host: int, target: Path) -> None:
        """Show an empty folder, or a file without content or permissions, at `target` on this host."""
        if Path(target).is_dir():
            empty = Path(tempfile.mkdtemp(prefix=f"{self.names[host]}-hidden-", dir=self.folder))
        else:
            empty = Path("/dev/null")
        self.mount(host, empty, target)

    def link(self, host: int, up: bool) -> None:
        """Plug or pull the host's network cable."""
        self._at_bridge("link", "set", self.names[host], "up" if up else "down")

    def lossy(self, host: int, percent: float) -> None:
        """Lose this share of the packets to the host, and of those from it."""
        for hook in (packet_filter.SENT, packet_filter.RECEIVED):
            self._filter(self.hosts[host], ("loss", hook), packet_filter.lose(percent) if percent else None)

    def firewall(self, host: int, open_ports: list[int] | None) -> None:
        """Drop new TCP connections to the host except to these ports; None: open all."""
        program = None if open_ports is None else packet_filter.only(open_ports)
        self._filter(self.hosts[host], ("ports", packet_filter.SENT), program)

    def memory(self, host: int, limit: int) -> None:
        """Limit the memory of all processes of the host together, in bytes, by a cgroup of its own."""
        limit_memory(_memory_group(self.hosts[host]), limit)

    def clock(self, host: int, seconds: int) -> None:
        """Set the host's clock back or forward against the others'. File times are not affected, as on a shared disk."""
        self._set_faults(host, 0, seconds)

    def slow_disk(self, host: int, folder: Path, seconds: float) -> None:
        """Let the host wait whenever it opens, reads, writes or syncs a file in `folder`."""
        self._set_faults(host, 1, seconds, bytes(folder.resolve()))

    def stop(self, host: int) -> None:
        """Cut the host's power: no connection is closed, and all of its processes are gone."""
        one = self.hosts[host]
        with suppress(subprocess.CalledProcessError):
            self._at_bridge("link", "delete", one.name)
        for file in one.files.values():
            os.close(file)
        one.files.clear()
        if one.process:
            # Killing process 1 first makes `unshare` return when the whole namespace is gone, rather than before.
            subprocess.run(["pkill", "-KILL", "-P", str(one.process.pid)], check=False)
            try:
                one.process.wait(10)
            finally:
                one.process.kill()
        one.process = None

    def start(self, host: int) -> None:
        """Boot a stopped host."""
        one = self.hosts[host]
        group = _memory_group(one) / "cgroup.procs"
        boot = ["sh", "-c", f"test ! -e {group} || echo $$ >{group}; exec sh {self.folder}/{one.name}.sh"]
        one.process = _started(
            [*ALONE, "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc", *boot],
            self.folder / f"{one.name}.log",
        )
        one.pid = int(subprocess.run(["pgrep", "-P", str(one.process.pid)], capture_output=True, text=True).stdout)
        there = ["nsenter", "--target", str(one.pid), "--net"]
        # A reboot keeps the network card's address, which the other hosts remember.
        card = ["name", "eth0", "address", f"02:00:00:77:00:{host + 1:02x}", "netns", str(one.pid)]
        self._at_bridge("link", "add", one.name, "type", "veth", "peer", *card)
        self._at_bridge("link", "set", one.name, "master", "bridge", "up")
        subprocess.run([*there, "ip", "address", "add", f"{one.address}/24", "dev", "eth0"], check=True)
        subprocess.run([*there, "ip", "link", "set", "eth0", "up"], check=True)
        for key, program in list(one.filters.items()):
            self._filter(one, key, program)

    def reboot(self, host: int, seconds: float = 0) -> None:
        """Cut the host's power; boot it with the same name and address after some seconds; return when ssh answers."""
        self.stop(host)
        time.sleep(seconds)
        self.start(host)
        self.wait_for_ssh([host])

    def wait_for_ssh(self, hosts: list[int]) -> None:
        """Wait until another host can reach each of these by ssh."""
        for host in hosts:
            ask = ["ssh", "-o", "ConnectTimeout=2", self.names[host], "true"]
            command, deadline = self.command((host + 1) % len(self.hosts), ask), time.monotonic() + STARTUP_SECONDS
            while (answer := subprocess.run(command, capture_output=True, text=True, timeout=20)).returncode:
                if time.monotonic() > deadline:
                    logs = [f"--- {log.name}\n{log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*.log"))]
                    raise AssertionError("\n".join([f"no ssh on {self.names[host]}: {answer.stderr}", *logs]))
                time.sleep(0.05)

    def _faults(self, host: Host) -> dict[str, str]:
        """Return the variables of the host's processes for host_faults.c."""
        return {"LD_PRELOAD": self.preload, "HOST_FAULTS": f"{self.folder}/{host.name}.faults"} if self.preload else {}

    def _set_faults(self, host: int, first: int, *values: object) -> None:
        """Replace fields of the settings that the host's processes have mapped."""
        assert self.preload, "use cluster(..., faults=True)"
        with (self.folder / f"{self.names[host]}.faults").open("r+b") as file:
            settings = list(FAULTS.unpack(file.read()))
            settings[first : first + len(values)] = values
            file.seek(0)
            file.write(FAULTS.pack(*settings))

    def _at_bridge(self, *argv: str) -> None:
        subprocess.run(["nsenter", "--target", str(self.bridge), "--net", "ip", *argv], check=True, capture_output=True)

    def _filter(self, host: Host, key: tuple[str, int], program: bytes | None) -> None:
        """Replace a program at the bridge's end of the host's link."""
        if key in host.files:
            os.close(host.files.pop(key))
        host.filters.pop(key, None)
        if program:
            host.filters[key] = program
            host.files[key] = packet_filter.attach(program, self.bridge, host.name, key[1])


@contextmanager
def cluster(folder: Path, hosts: int = 2, faults: bool = False) -> Iterator[Cluster]:
    """Start host1, host2, ...; yield them once each can be reached by ssh.

    Args:
        faults: preload what `clock` and `slow_disk` need.
    """
    folder = folder.resolve()
    us = Cluster(folder, [Host(f"host{n}", f"10.77.0.{n}") for n in range(1, hosts + 1)])
    us.preload = _faults_library() if faults else ""
    _configure(us)
    with ExitStack() as stack:
        bridge = _started([*ALONE, "sh", "-c", BRIDGE], folder / "bridge.log")
        stack.callback(bridge.wait)
        stack.callback(bridge.kill)
        us.bridge = bridge.pid
        for number, host in enumerate(us.hosts):
            stack.callback(_remove_memory_group, host)
            stack.callback(us.stop, number)
            with suppress(OSError):
                _memory_group(host).mkdir()
            us.start(number)
        us.wait_for_ssh(list(range(hosts)))
        yield us


def _configure(us: Cluster) -> None:
    """Write keys, and the hosts' replacements of this machine's configuration."""
    folder, sshd = us.folder, shutil.which("sshd")
    folder.mkdir(parents=True, exist_ok=True)
    for key in ("key", "host_key"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(folder / key)]
        subprocess.run(keygen, check=True, stdin=subprocess.DEVNULL)
    (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
    known = "".join(f"{host.address} {host.name}\n" for host in us.hosts)
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n::1 localhost\n{known}")
    for host in us.hosts:
        variables = {"LANG": "C.UTF-8"} | warm.read_on_import() | us._faults(host)
        environment = " ".join(f'"{name}={value}"' for name, value in variables.items())
        (folder / f"{host.name}.sshd_config").write_text(SSHD_CONFIG.format(folder=folder, environment=environment))
        (folder / f"{host.name}.faults").write_bytes(FAULTS.pack(0, 0, b""))
        (folder / f"{host.name}.sh").write_text(BOOT.format(name=host.name, folder=folder, sshd=sshd))
        (folder / f"{host.name}.mounts").touch()


@functools.cache
def _faults_library() -> str:
    """Compile host_faults.c, once."""
    folder = Path(tempfile.mkdtemp(prefix="smolds-faults-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    compile_it = ["gcc", "-O1", "-shared", "-fPIC", "-o", folder / "host_faults.so", HERE / "host_faults.c", "-ldl"]
    subprocess.run(compile_it, check=True)
    return str(folder / "host_faults.so")


def _started(command: list[str], log: Path) -> subprocess.Popen:
    """Start a process in a session of its own; return it when it has printed `started`."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=file, start_new_session=True
        )
    assert process.stdout
    with process.stdout as output:
        if output.readline() != b"started\n":
            process.kill()
            raise AssertionError(f"{log.stem} did not start: {log.read_text()}")
    return process


def _memory_group(host: Host) -> Path:
    return MEMORY_GROUPS / f"smolds-test-{os.getpid()}-{host.name}"


def _remove_memory_group(host: Host) -> None:
    with suppress(FileNotFoundError):
        _memory_group(host).rmdir()


def limit_memory(group: Path, limit: int) -> None:
    """Set the limit of a memory cgroup, v1 or v2."""
    files = [group / name for name in ("memory.limit_in_bytes", "memory.max") if (group / name).exists()]
    if not files:
        raise OSError(f"{group} has no memory limit: cannot create a memory cgroup here")
    files[0].write_text(str(limit))
