"""Divide a machine's CPUs among its ranks: complete cores, near the rank's GPU, from Linux's sysfs.

A CPU is what the kernel schedules on: a hyperthread of a core.
"""

import ctypes
from collections.abc import Iterable
from pathlib import Path

SYSFS = Path("/sys")


def divide(cpus: Iterable[int], ranks: int, gpus: list[str], sysfs: Path = SYSFS) -> list[set[int]]:
    """Return the CPUs of each rank of a machine, which are disjoint; none if ranks should share them all.

    They do if there are too few cores. So do ranks without GPUs on one memory node: bound ones keep their caches but cannot
    leave a core that another program uses, which took up to 40 % of the tokens/s on two busy cores.

    Args:
        cpus: all that the ranks may use.
        gpus: the PCI address of each rank's GPU, or none if unknown.
    """
    everything, nodes = frozenset(cpus), _nodes(sysfs)
    if not gpus and len({nodes.get(cpu) for cpu in everything}) == 1:
        return []
    near = [everything & read_cpus(sysfs / "bus/pci/devices" / gpu / "local_cpulist") or everything for gpu in gpus]
    alternatives = [near] if len({cpu for some in set(near) for cpu in some}) == sum(map(len, set(near))) else []
    least = 2 if gpus else 1  # a rank's backward pass and its NCCL run in threads of their own
    for choice in [*alternatives, [everything] * ranks]:
        shares = [set[int]()] * ranks
        for some in set(choice):
            members, cores = [rank for rank in range(ranks) if choice[rank] == some], cores_of(some, sysfs)
            each = len(cores) // len(members)
            for index, rank in enumerate(members):
                shares[rank] = {cpu for core in cores[index * each : (index + 1) * each] for cpu in core}
        if all(len(cores_of(share, sysfs)) >= least for share in shares):
            return shares
    return []


def cores_of(cpus: Iterable[int], sysfs: Path = SYSFS) -> list[set[int]]:
    """Return the CPUs of each core, those of one memory node next to each other."""
    nodes = _nodes(sysfs)
    cores: dict[int, set[int]] = {}
    for cpu in sorted(cpus):
        siblings = read_cpus(sysfs / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault(min(siblings, default=cpu), set()).add(cpu)
    return sorted(cores.values(), key=lambda core: (nodes.get(min(core), 0), min(core)))


def _nodes(sysfs: Path) -> dict[int, int]:
    """Return the memory node of each CPU."""
    files = sorted(sysfs.glob("devices/system/node/node*/cpulist"))
    return {cpu: node for node, path in enumerate(files) for cpu in read_cpus(path)}


def read_cpus(path: Path) -> frozenset[int]:
    """Return the CPUs of a file such as "0-3,8"; none if there is no such file."""
    try:
        ranges = [one.split("-") for one in path.read_text().strip().split(",") if one]
        return frozenset(cpu for one in ranges for cpu in range(int(one[0]), int(one[-1]) + 1))
    except (OSError, ValueError):
        return frozenset()


def gpu_addresses() -> list[str]:
    """Return the PCI addresses of the GPUs that this process can access, in CUDA's order; none without an NVIDIA driver.

    PyTorch could answer only after its import, when threads have started. Untested on CUDA.
    """
    count, device, address = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(32)
    found = []
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
            return []
        for index in range(count.value):
            if cuda.cuDeviceGet(ctypes.byref(device), index) or cuda.cuDeviceGetPCIBusId(address, 32, device):
                return []
            found.append(address.value.decode().lower())
    except (OSError, AttributeError):
        return []
    return found
