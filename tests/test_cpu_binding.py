"""Ranks have complete cores near their GPUs, on machines described by made-up sysfs trees."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import ROOT, run

from smolds_dist.parallel.cpu_binding import cores_of, divide

GPUS = ["0000:17:00.0", "0000:3d:00.0", "0000:9a:00.0", "0000:ca:00.0"]
TWO_SOCKETS = [[0, 1, 2, 3], [4, 5, 6, 7]]
ALTERNATING = [[0, 2, 4, 6], [1, 3, 5, 7]]


def sysfs(root: Path, sockets: list[list[int]], threads: int, gpus: list[int | str]) -> Path:
    """Write a machine: hyperthread i of core C is CPU `C + i * cores`; a GPU is near a socket, or has a list of its own."""
    cores = sum(map(len, sockets))
    lists = []
    for node, socket in enumerate(sockets):
        lists.append(",".join(str(core + i * cores) for i in range(threads) for core in socket))
        write(root / f"devices/system/node/node{node}/cpulist", lists[-1])
        for core in socket:
            siblings = [core + i * cores for i in range(threads)]
            for cpu in siblings:
                topology = root / f"devices/system/cpu/cpu{cpu}/topology"
                write(topology / "thread_siblings_list", ",".join(map(str, siblings)))
    for address, near in zip(GPUS, gpus, strict=False):
        write(root / "bus/pci/devices" / address / "local_cpulist", lists[near] if isinstance(near, int) else near)
    return root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def pairs(*cores: int) -> set[int]:
    return {cpu for core in cores for cpu in (core, core + 8)}


@pytest.mark.parametrize(
    ("sockets", "threads", "gpus", "cpus", "ranks", "expected"),
    [
        ([[0, 1, 2, 3, 4]], 1, [0, 0], range(5), 2, [{0, 1}, {2, 3}]),
        ([[0, 1, 2, 3]], 1, [], range(4), 2, []),  # ranks without GPUs on one memory node
        ([[0], [1]], 1, [], range(2), 3, []),
        ([[0], [1]], 2, [], range(4), 3, []),  # two cores of two hyperthreads
        (TWO_SOCKETS, 2, [], range(16), 2, [pairs(0, 1, 2, 3), pairs(4, 5, 6, 7)]),
        (ALTERNATING, 1, [], range(8), 2, [{0, 2, 4, 6}, {1, 3, 5, 7}]),
        (TWO_SOCKETS, 2, [1, 0, 1, 0], range(16), 4, [pairs(4, 5), pairs(0, 1), pairs(6, 7), pairs(2, 3)]),
        (ALTERNATING, 1, [1], range(8), 1, [{1, 3, 5, 7}]),
        (TWO_SOCKETS, 2, [0, 1], [2, 3, 5, 6, 7, 10, 11, 14, 15], 2, [pairs(2, 3), {5} | pairs(6, 7)]),
        # GPUs without cores that are allowed, with lists that overlap, near too few cores, and without lists
        (TWO_SOCKETS, 1, [0, 1], range(4), 2, [{0, 1}, {2, 3}]),
        (TWO_SOCKETS, 1, ["0-5", "4-7"], range(8), 2, [{0, 1, 2, 3}, {4, 5, 6, 7}]),
        (TWO_SOCKETS, 1, [0, 0, 0, 1], range(8), 4, [{0, 1}, {2, 3}, {4, 5}, {6, 7}]),
        (TWO_SOCKETS, 1, [0, ""], range(8), 2, [{0, 1, 2, 3}, {4, 5, 6, 7}]),
        (TWO_SOCKETS, 1, [0, 0, 1, 1], range(6), 4, []),  # a GPU's rank needs two cores
    ],
)  # fmt: skip
def test_cpus_of_ranks(tmp_path, sockets, threads, gpus, cpus, ranks, expected):
    assert divide(cpus, ranks, GPUS[: len(gpus)], sysfs(tmp_path, sockets, threads, gpus)) == expected


def test_without_sysfs_every_cpu_is_a_core(tmp_path):
    assert divide({3, 5, 6, 9}, 2, GPUS[:2], tmp_path) == [{3, 5}, {6, 9}]
    assert cores_of({1, 0}, tmp_path) == [{0}, {1}]


CUDA = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = 7 + index; return 0; }
int cuDeviceGetPCIBusId(char *address, int size, int device) {
    strcpy(address, device == 7 ? "0000:3D:00.0" : "0000:9A:00.0");
    return 0;
}
"""


def test_addresses_of_gpus_are_the_drivers(tmp_path):
    """The driver is a stand-in with the functions of CUDA's documentation."""
    (tmp_path / "cuda.c").write_text(CUDA)
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "cuda.c"], check=True)
    script = "from smolds_dist.parallel.cpu_binding import gpu_addresses; print(*gpu_addresses())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for path, expected in ((str(tmp_path), GPUS[1:3]), ("", [])):
        command = [sys.executable, "-c", script]
        shown = subprocess.run(command, capture_output=True, text=True, env=environment | {"LD_LIBRARY_PATH": path})
        assert shown.stdout.split() == expected, shown.stderr


# On a machine with two more CPUs than its parent and it may use.
SHARE = """
import json, os, sys
from pathlib import Path
from smolds_dist.data.cores import free_cores, use_all_cores
from smolds_dist.parallel.rank_environment import set_torch_variables, share_cores
from smolds_dist.parallel.ranks import RankInfo
os.cpu_count = lambda: 4
set_torch_variables()
share_cores(RankInfo(1, 1, 2, size_from=sys.argv[1]), on_gpu=True, sysfs=Path(sys.argv[2]))
bound, threads, free = os.sched_getaffinity(0), os.environ["OMP_NUM_THREADS"], free_cores(1)
use_all_cores()
values = {name: os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "TORCH_FR_BUFFER_SIZE")}
print(json.dumps([[*bound], threads, free, [*os.sched_getaffinity(0)], values]))
"""
LAUNCHED = """
import os, sys
from pathlib import Path
from smolds_dist.parallel.rank_environment import share_cores
from smolds_dist.parallel.ranks import join_ranks
share_cores(info := join_ranks(), on_gpu=False, sysfs=Path(sys.argv[1]))
print(f"rank {info.rank} has {sorted(os.sched_getaffinity(0))}.")
"""


@pytest.fixture
def two_cpus(tmp_path):
    """Return two CPUs that this process may use, each on a socket of its own in the sysfs of the folder."""
    cpus = sorted(os.sched_getaffinity(0))[:2] if hasattr(os, "sched_getaffinity") else []
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    sysfs(tmp_path, [[cpu] for cpu in cpus], 1, [])
    return cpus


@pytest.mark.parametrize(
    ("launcher", "variables", "bound", "values"),
    [
        ("WORLD_SIZE", {}, [1], ["expandable_segments:True", "2000"]),
        ("OMPI_COMM_WORLD_SIZE", {"PYTORCH_CUDA_ALLOC_CONF": "x", "TORCH_FR_BUFFER_SIZE": "5"}, [0, 1], [None, "5"]),
        ("OMPI_COMM_WORLD_SIZE", {"PYTORCH_ALLOC_CONF": "x", "TORCH_NCCL_TRACE_BUFFER_SIZE": "5"}, [0, 1], ["x", None]),
    ],
)
def test_limited_cpus_are_divided_unless_the_launcher_binds_ranks(
    two_cpus, tmp_path, launcher, variables, bound, values
):
    """And the user's own variables of PyTorch are kept."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | variables
    environment.pop("OMP_NUM_THREADS", None)
    start = f'"{sys.executable}" -c "$0" {launcher} "{tmp_path}"; true'  # sh starts it and does not become it
    command = ["taskset", "-c", ",".join(map(str, two_cpus)), "sh", "-c", start, SHARE]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = json.loads(finished.stdout)
    cpus = [two_cpus[index] for index in bound]
    assert found == [cpus, str(len(bound)), 1, two_cpus, dict(zip(found[4], values, strict=True))], finished.stderr


def test_launched_ranks_have_cpus_of_their_own(two_cpus, tmp_path):
    (tmp_path / "rank.py").write_text(LAUNCHED)
    command = ["torchrun", "--standalone", "--nproc-per-node=2", str(tmp_path / "rank.py"), str(tmp_path)]
    finished = run(["taskset", "-c", ",".join(map(str, two_cpus)), *command], 60, PYTHONPATH=str(ROOT))
    lines = sorted(line for line in finished.stdout.splitlines() if line.startswith("rank"))
    assert lines == [f"rank {rank} has [{cpu}]." for rank, cpu in enumerate(two_cpus)], finished.text
