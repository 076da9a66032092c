"""Who this process is among the ranks, whichever program started it, and where the ranks meet.

torchrun and deepspeed say so in the environment. Under mpirun, mpi4py finds it out; under srun, Slurm's variables say it.
The answer is written to the variables that torch and DeepSpeed read (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE,
MASTER_ADDR, MASTER_PORT), so that nothing else has to know who started the ranks.
"""

import contextlib
import os
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from smolds_dist.errors import ConfigError


@dataclass(frozen=True)
class RankInfo:
    """This process among the ranks."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int | None = None  # ranks on this node; None: all

    @property
    def ranks_per_node(self) -> int:
        return self.local_world_size or self.world_size


def join_ranks() -> RankInfo:
    """This process's rank; a single one where no launcher started it. Afterwards the environment says the same.

    Raises:
        ConfigError: where a launcher's variables are incomplete or mpi4py is missing.
    """
    if "RANK" not in os.environ:
        if int(os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("PMI_SIZE", "1"))) > 1:
            os.environ |= _ranks_of_mpi()
        elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
            os.environ |= _ranks_of_slurm()
        else:
            return RankInfo()
    return rank_from_environment()


def rank_from_environment() -> RankInfo:
    """The rank that the environment names; a single one where it names none.

    Raises:
        ConfigError: where RANK is set but its companions are not.
    """
    if "RANK" not in os.environ:
        return RankInfo()
    try:
        rank, local_rank, world = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"RANK is set in the environment but {error} is missing or no number; start ranks with `smolds launch`, "
            "or unset RANK for a single process."
        ) from None
    # torchrun's name, then deepspeed's
    local_world = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return RankInfo(rank, local_rank, world, int(local_world) if local_world else None)


def _ranks_of_slurm() -> dict[str, str]:
    """From the variables that srun gives each task of a step."""
    env = os.environ
    node, nodes = int(env.get("SLURM_NODEID", 0)), env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", ""))
    job, step = int(env.get("SLURM_JOB_ID", 0)), int(env.get("SLURM_STEP_ID", 0))
    # "4(x2),3" means 4, 4, 3 tasks
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_STEP_NUM_TASKS"]))
    tasks = [int(count) for count, repeat in counts for _ in range(int(repeat or 1))]
    return {
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": str(tasks[node] if node < len(tasks) else tasks[-1]),
        "MASTER_ADDR": env.get("MASTER_ADDR") or _first_slurm_host(nodes),
        # All tasks must come to the same port without talking: below the ports that systems give to clients.
        "MASTER_PORT": env.get("MASTER_PORT") or str(15000 + (job * 101 + step) % 15000),
    }


def _first_slurm_host(nodes: str) -> str:
    """Address of the first of Slurm's nodes, "n[1-4]" or "n1,n2"."""

    def scontrol(*args: str) -> str:
        return subprocess.run(["scontrol", *args], capture_output=True, text=True, check=True, timeout=30).stdout

    try:
        name = scontrol("show", "hostnames", nodes).split()[0]
        with contextlib.suppress(OSError):
            return socket.gethostbyname(name)
        # A node's name in Slurm need not be a host name.
        match = re.search(r"NodeAddr=(\S+)", scontrol("show", "node", name))
        return match.group(1) if match else name
    except (OSError, subprocess.SubprocessError, IndexError):
        raise ConfigError(
            f"the address of the first of the Slurm nodes {nodes!r} was not found with scontrol; set MASTER_ADDR to it."
        ) from None


def _ranks_of_mpi() -> dict[str, str]:
    """From MPI itself: the local rank through a shared-memory split, the address proved by a connection of every rank."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ConfigError(
            f"mpirun started these ranks, but mpi4py cannot be loaded ({error}); pip install 'smolds-dist[mpi]'."
        ) from None
    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    with socket.create_server(("0.0.0.0", 0)) as server:
        offered = world.bcast((_own_addresses(), server.getsockname()[1]) if world.rank == 0 else None)
        addresses, port = offered
        reached = set() if world.rank == 0 else {a for a in addresses if _reachable(a, port)}
        everyone = world.allgather(reached)
    common = [a for a in addresses if all(a in seen for seen in everyone[1:])]
    if not common:
        missed = [rank for rank, seen in enumerate(everyone) if rank and not seen]
        raise ConfigError(
            f"no address of rank 0 ({', '.join(addresses)}) is reachable from rank {missed[0] if missed else 1}; "
            "open the nodes' network to each other, or set MASTER_ADDR and MASTER_PORT and start with torchrun."
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
    MPI.Finalize()  # torch and DeepSpeed do the rest; a rank that ends without this would look like a crash to mpirun
    return answer


def _own_addresses() -> list[str]:
    """This host's IPv4 addresses, the loopback last."""
    import psutil

    found = [a.address for nic in psutil.net_if_addrs().values() for a in nic if a.family == socket.AF_INET]
    return sorted(set(found), key=lambda address: (address.startswith("127."), address))


def _reachable(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=3):
            return True
    except OSError:
        return False


def interface_towards(address: str) -> str | None:
    """Name of the network interface over which this host reaches `address`; None where it can't be told."""
    import psutil

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect((address, 9))  # sends nothing, only chooses the route
            own = sock.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == own for a in addresses):
            return name
    return None


def share_cores(info: RankInfo) -> None:
    """Gives the ranks of a node each its own part of the cores, and torch as many threads. Before torch is imported.

    Cores that a launcher or Slurm has already set apart for this rank stay as they are; so does OMP_NUM_THREADS where the
    user or the launcher has set it. Where there are more ranks than cores, or no affinity (macOS), only threads are set.
    """
    ranks = info.ranks_per_node
    if ranks == 1:
        return
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    each = max(1, len(cores) // ranks)
    if len(cores) == os.cpu_count() and len(cores) >= ranks and hasattr(os, "sched_setaffinity"):
        first = info.local_rank * each
        os.sched_setaffinity(0, cores[first : first + each])
    elif len(cores) < (os.cpu_count() or 1):
        each = len(cores)
    os.environ.setdefault("OMP_NUM_THREADS", str(each))


def host_name() -> str:
    """This node's name, as Slurm calls it if Slurm runs it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def system_name() -> str:
    """Names what a process number is valid in: the booted machine and its process namespace."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return host_name()


def process_state(pid: int) -> str:
    """The kernel's letter for a process of this system: R, S, D, T (stopped), Z, or X for one that is gone."""
    try:
        # The state stands behind the command's name, which may hold anything but ends with the last ")".
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        if Path("/proc/self").exists():
            return "X"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "X"
    return "S"
