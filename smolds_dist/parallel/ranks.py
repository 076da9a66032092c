"""Find this process's rank and the rendezvous address, whichever launcher started it.

torchrun and deepspeed set environment variables; under mpirun, mpi4py provides the values; under srun, Slurm's variables
do. The result is written to the variables that torch and DeepSpeed read (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE,
MASTER_ADDR, MASTER_PORT), so that no other code depends on the launcher.
"""

import contextlib
import ctypes
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smolds_dist.errors import ConfigError, RankError, first_line

LOG_AFTER = 10.0  # seconds of waiting for other ranks before the first message


@dataclass(frozen=True)
class RankInfo:
    """This process's rank and the world size."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int | None = None  # ranks on this node; None: all
    size_from: str = "WORLD_SIZE"  # the variable with the world size
    gpus_on_node: int = 0  # that Slurm gave the ranks of this node, of which each rank may see only its own

    @property
    def ranks_per_node(self) -> int:
        return self.local_world_size or self.world_size


# The variables with the world size and the rank, for launchers other than torchrun and deepspeed
MPI_VARIABLES = {"OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK", "PMI_SIZE": "PMI_RANK"}
SLURM_VARIABLES = {"SLURM_STEP_NUM_TASKS": "SLURM_PROCID"}


def detect_launcher(environment: Mapping[str, str]) -> str | None:
    """Return the variable with the world size, if any; RANK and WORLD_SIZE take precedence."""
    if "RANK" in environment:
        return "WORLD_SIZE"
    for size in MPI_VARIABLES | SLURM_VARIABLES:
        value = environment.get(size, "")
        if value.isdecimal() and int(value) > 1:
            return size
    return None


def is_first_rank(environment: Mapping[str, str]) -> bool:
    """Return True if this process is rank 0 or a single one; works before the ranks have joined."""
    size = detect_launcher(environment)
    return size is None or environment.get((MPI_VARIABLES | SLURM_VARIABLES).get(size, "RANK"), "0") == "0"


def is_first_of_host(environment: Mapping[str, str]) -> bool:
    """Return True if this process is the first rank of its host, or a single one; works before the ranks have joined."""
    names = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
    return next((environment[name] for name in names if name in environment), "0") == "0"


def single_process_hint(info: RankInfo) -> str:
    """Return the fix as part of a message."""
    variables = "RANK WORLD_SIZE" if info.size_from == "WORLD_SIZE" else info.size_from
    return f"`unset {variables}` to train in this process alone"


def waiting_message(info: RankInfo, seconds: float, missing: str) -> str:
    """Return the message of a waiting rank, printed after `LOG_AFTER` seconds and at the timeout."""
    ports = ", or open this port between the hosts" if info.ranks_per_node < info.world_size else ""
    return (
        f"rank {info.rank} has waited {seconds:.0f} s for {missing}, because {info.size_from} sets the world size to "
        f"{info.world_size}; {single_process_hint(info)}, or start all ranks with `smolds launch`{ports}."
    )


def join_ranks(timeout: float = 0.0) -> RankInfo:
    """Find this process's rank, write it to the environment and return it; a single process if no launcher started it.

    Args:
        timeout: seconds to wait for the ranks of an MPI job to start; 0 = no limit.

    Raises:
        ConfigError: if a launcher's variables are incomplete or wrong, or mpi4py is missing.
    """
    size = detect_launcher(os.environ)
    if size is None:
        return RankInfo()
    if size in MPI_VARIABLES:
        os.environ |= _ranks_of_mpi(size, timeout)
    elif size in SLURM_VARIABLES:
        os.environ |= _ranks_of_slurm()
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0) if size in SLURM_VARIABLES else 0
    return replace(rank_from_environment(), size_from=size, gpus_on_node=gpus)


ALONE_FIX = f"start ranks with `smolds launch`, or {single_process_hint(RankInfo())}"


def rank_from_environment() -> RankInfo:
    """Read the rank from the environment; a single process if RANK is not set.

    Raises:
        RankError: if RANK is set but the other variables are missing or contradict it.
    """
    if "RANK" not in os.environ:
        return RankInfo()
    try:
        rank, local_rank, world = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    except (KeyError, ValueError) as error:
        raise RankError(
            f"RANK is set in the environment but {error} is missing or not a number; {ALONE_FIX}."
        ) from None
    if not 0 <= rank < world:
        raise RankError(f"RANK={rank} in the environment is not below WORLD_SIZE={world}; {ALONE_FIX}.")
    if world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise RankError(f"WORLD_SIZE={world} in the environment, but not MASTER_ADDR and MASTER_PORT; {ALONE_FIX}.")
    # torchrun's name, then deepspeed's
    local_world = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return RankInfo(rank, local_rank, world, int(local_world) if local_world else None)


def slurm_counts(text: str) -> list[int]:
    """Return Slurm's numbers per node: [4, 4, 3] for "4(x2),3"."""
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, repeat in counts for _ in range(int(repeat or 1))]


def _ranks_of_slurm() -> dict[str, str]:
    """Return the variables from those that srun sets for each task of a step."""
    env = os.environ
    node, nodes = int(env.get("SLURM_NODEID", 0)), env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", ""))
    job, step = int(env.get("SLURM_JOB_ID", 0)), int(env.get("SLURM_STEP_ID", 0))
    tasks = slurm_counts(env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_STEP_NUM_TASKS"]))
    return {
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": str(tasks[node] if node < len(tasks) else tasks[-1]),
        "MASTER_ADDR": env.get("MASTER_ADDR") or _first_slurm_host(nodes),
        # All tasks must choose the same port without communication; it is below the systems' ephemeral ports.
        "MASTER_PORT": env.get("MASTER_PORT") or str(15000 + (job * 101 + step) % 15000),
    }


def _first_slurm_host(nodes: str) -> str:
    """Return the address of the first of Slurm's nodes, "n[1-4]" or "n1,n2"."""

    def scontrol(*args: str) -> str:
        return subprocess.run(["scontrol", *args], capture_output=True, text=True, check=True, timeout=30).stdout

    try:
        name = scontrol("show", "hostnames", nodes).split()[0]
        with contextlib.suppress(OSError):
            return socket.gethostbyname(name)
        # A Slurm node name may not be a host name.
        match = re.search(r"NodeAddr=(\S+)", scontrol("show", "node", name))
        return match.group(1) if match else name
    except (OSError, subprocess.SubprocessError, IndexError):
        raise ConfigError(
            f"scontrol does not give the address of the first of the Slurm nodes {nodes!r}; set MASTER_ADDR to it."
        ) from None


def _ranks_of_mpi(size: str, timeout: float) -> dict[str, str]:
    """Return the variables from MPI: the local rank by a shared-memory split, the address tested by every rank.

    Args:
        size: the variable with the MPI job's number of ranks.
        timeout: seconds to wait for them to start; 0 = no limit.
    """
    info = RankInfo(int(os.environ.get(MPI_VARIABLES[size], "0")), 0, int(os.environ[size]), size_from=size)
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: without an MPI library
        raise ConfigError(
            f"{size} is {info.world_size}, but mpi4py cannot be loaded ({first_line(error)}); "
            f"{single_process_hint(info)}, or install an MPI library and smolds-dist[mpi]."
        ) from None
    with _log_while_waiting(info, timeout):
        _initialize_mpi(MPI)
    world = MPI.COMM_WORLD
    if world.size != info.world_size:
        raise RankError(
            f"{size} is {info.world_size}, but MPI's world size is {world.size}; {single_process_hint(info)}, or, if mpirun "
            "started this, install an mpi4py built for its MPI."
        )
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    with _listen(world.rank) as server:
        own = sorted(_interfaces(), key=lambda address: (address.startswith("127."), address))  # loopback last
        addresses, port = world.bcast((own, server.getsockname()[1]) if world.rank == 0 else None)
        reached = set() if world.rank == 0 else {a for a in addresses if can_connect(a, port)}
        everyone = world.allgather(reached)
    common = [a for a in addresses if all(a in seen for seen in everyone[1:])]
    if not common:
        missed = [rank for rank, seen in enumerate(everyone) if rank and not seen]
        raise ConfigError(
            f"no address of rank 0 ({', '.join(addresses)}) is reachable from rank {missed[0] if missed else 1}; "
            "allow connections between the nodes, or set MASTER_ADDR and MASTER_PORT and start with torchrun."
        )
    answer = {
        "RANK": str(world.rank),
        "LOCAL_RANK": str(local.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_WORLD_SIZE": str(local.size),
        "MASTER_ADDR": common[0],
        "MASTER_PORT": str(port),
    }
    local.Free()
    MPI.Finalize()  # torch and DeepSpeed do the rest; mpirun would take an exit without this for a crash
    return answer


def _listen(rank: int) -> socket.socket:
    """Listen at a free port, rank 0 at MASTER_PORT if it is set."""
    port = os.environ.get("MASTER_PORT", "0") if rank == 0 else "0"
    try:
        return socket.create_server(("0.0.0.0", int(port)))
    except (OSError, OverflowError, ValueError) as error:
        raise RankError(
            f"MASTER_PORT={port} cannot be used on host {host_name()} ({first_line(error)}); set it to a free port, or "
            "unset it."
        ) from None


@contextlib.contextmanager
def _log_while_waiting(info: RankInfo, timeout: float) -> Iterator[None]:
    """Print after `LOG_AFTER` seconds what this process waits for, and exit after `timeout`."""
    over = threading.Event()

    def watch() -> None:
        waited = 0.0
        for seconds in sorted({min(LOG_AFTER, timeout or LOG_AFTER), timeout or LOG_AFTER}):
            if over.wait(seconds - waited):
                return
            text = waiting_message(info, seconds, "the other ranks of its MPI job")
            print(f"smolds: {text}", file=sys.stderr, flush=True)
            waited = seconds
        if timeout:
            os._exit(2)

    threading.Thread(target=watch, name="watch-mpi", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _initialize_mpi(mpi: Any) -> None:
    """Call MPI_Init_thread without the GIL.

    mpi4py 4.1 holds the GIL until all ranks have started, so that no message could be printed. Remove when it releases it.
    """
    function = getattr(ctypes.CDLL(mpi.__file__), "MPI_Init_thread", None)
    if function is None:
        mpi.Init_thread()
    elif not mpi.Is_initialized():
        function(None, None, int(mpi.THREAD_MULTIPLE), ctypes.byref(ctypes.c_int()))


def _interfaces() -> dict[str, str]:
    """Return the network interface of each of this host's IPv4 addresses."""
    import psutil

    found = psutil.net_if_addrs().items()
    return {one.address: name for name, some in found for one in some if one.family == socket.AF_INET}


def can_connect(address: str, port: int) -> bool:
    """Return True if a TCP connection opens within three seconds."""
    try:
        socket.create_connection((address, port), timeout=3).close()
    except OSError:
        return False
    return True


def address_towards(host: str) -> str | None:
    """Return this host's own address from which it reaches `host`; None if unknown."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((host, 9))  # sends nothing, only chooses the route
            return sock.getsockname()[0]
    except OSError:
        return None


def interface_towards(host: str) -> str | None:
    """Return the name of the network interface over which this host reaches `host`; None if unknown."""
    return _interfaces().get(address_towards(host) or "")


def host_name() -> str:
    """Return this node's name, under Slurm its Slurm name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def system_name() -> str:
    """Return an id of the scope in which pids are valid: the booted machine and its pid namespace."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return host_name()


def process_state(pid: int) -> str:
    """Return the kernel's state letter for a process of this system: R, S, D, T (stopped), Z, or X if it does not exist."""
    try:
        # The state follows the command's name, which may contain anything but ends with the last ")".
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # no such process, or no /proc
        import psutil

        return "S" if psutil.pid_exists(pid) else "X"


def process_started() -> float:
    """Return this process's start in `time.time()` seconds, precise to 0.01 s.

    `psutil.Process.create_time` (7.2, Linux) rounds the boot time to whole seconds, so it may be a second early.
    """
    import psutil

    started = psutil.Process().create_time()
    if sys.platform != "linux":
        return started
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - (started - psutil.boot_time())
    return time.time() - age
