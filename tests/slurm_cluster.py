"""A real Slurm cluster of virtual nodes on this machine, for tests: munged, slurmctld and one slurmd per node.

All of it runs in one process namespace, whose end kills every daemon, step and task with all their children, also when the
test process itself is killed. It reads and writes only `folder` and one short folder in /tmp.
"""

import os
import secrets
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = "munged slurmctld slurmd sinfo setpriv unshare pkill".split()
STARTUP_SECONDS = 30

# cred_expire is also the wait of a requeued job, 120 s by default. Cgroups and accounting are off: containers and CI
# machines have neither. sched_* and bf_* let the scheduler run every second; the default is up to a minute.
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={short}/munge,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={short}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
PlugStackConfig={folder}/plugstack.conf
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=10
OverTimeLimit=0
"""


def available() -> str | None:
    """Return why no cluster can run here, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return None if os.geteuid() == 0 else "needs root, to start daemons in their own process namespace"


@contextmanager
def slurm_cluster(folder: Path, cpus: tuple[int, ...] = (2, 2), gpus: bool = False) -> Iterator[dict[str, str]]:
    """Start nodes n1, n2, ... with these numbers of CPUs; yield the environment for Slurm's commands.

    Args:
        gpus: give each node two GPUs. These are other devices: only Slurm takes them for GPUs.
    """
    folder = folder.resolve()
    # A Unix socket's path has at most 107 characters, which pytest's folders can exceed.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as short:
        environment = {"SLURM_CONF": str(_configure(folder, short, cpus, gpus))}
        with _daemons(folder, short, len(cpus), environment):
            _wait_until_idle(folder, len(cpus), environment)
            yield environment


def _configure(folder: Path, short: str, cpus: tuple[int, ...], gpus: bool) -> Path:
    """Write slurm.conf and the other files of the daemons."""
    (folder / "state").mkdir(parents=True)
    (folder / "plugstack.conf").touch()
    (folder / "gres.conf").write_text("Name=gpu File=/dev/zero\nName=gpu File=/dev/full\n" if gpus else "")
    (folder / "cgroup.conf").write_text("IgnoreSystemd=yes\n")
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    host = socket.gethostname().split(".")[0]
    port, *node_ports = _free_ports(1 + len(cpus))
    gres = " Gres=gpu:2\nGresTypes=gpu" if gpus else ""
    lines = [CONFIG.format(host=host, port=port, folder=folder, short=short)]
    for number, (node_port, count) in enumerate(zip(node_ports, cpus, strict=True), 1):
        Path(short, f"n{number}").mkdir()
        lines.append(
            f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs={count} RealMemory=1000{gres}"
        )
    lines.append(f"PartitionName=test Nodes=n[1-{len(cpus)}] Default=YES MaxTime=INFINITE State=UP\n")
    path = folder / "slurm.conf"
    path.write_text("\n".join(lines))
    return path


def _free_ports(count: int) -> list[int]:
    """Return distinct free ports."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@contextmanager
def _daemons(folder: Path, short: str, nodes: int, environment: dict[str, str]) -> Iterator[None]:
    """Run the daemons under a shell that is process 1 of its namespace: when it ends, the kernel kills all others."""
    f, s = shlex.quote(str(folder)), shlex.quote(short)
    munged = f"munged --foreground --force --key-file={f}/munge.key --socket={s}/munge --pid-file={f}/munged.pid"
    munged += f" --log-file={f}/munged.log --seed-file={f}/munged.seed --num-threads=2"
    slurmd = " ".join(f"slurmd -D -N n{number} &" for number in range(1, nodes + 1))
    script = f"{munged} & until test -S {s}/munge; do sleep 0.05; done; slurmctld -D -c & {slurmd} wait"
    with (folder / "daemons.log").open("wb") as log:
        outer = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child", "--mount-proc",
             "sh", "-c", script],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | environment, start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        # Killing process 1 first makes `unshare` return when the whole namespace is gone, rather than before.
        subprocess.run(["pkill", "-KILL", "-P", str(outer.pid)], check=False)
        try:
            outer.wait(10)
        finally:
            outer.kill()


def _wait_until_idle(folder: Path, nodes: int, environment: dict[str, str]) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    seen = ""
    while time.monotonic() < deadline:
        command = ["sinfo", "--noheader", "--Node", "--format=%t"]
        answer = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
        if answer.stdout.split() == ["idle"] * nodes:
            return
        seen = answer.stdout + answer.stderr
        time.sleep(0.2)
    tails = [f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in folder.glob("*.log")]
    raise AssertionError("\n".join([f"no idle nodes after {STARTUP_SECONDS} s: {seen}", *tails]))
