"""Prepare a rank's process before torch is imported: PyTorch's variables, the process's CPUs and its threads."""

import os
import platform
from pathlib import Path

from smolds_dist.data.cores import SHARED
from smolds_dist.parallel.cpu_binding import SYSFS, cores_of, divide, gpu_addresses
from smolds_dist.parallel.ranks import RankInfo

ALLOCATOR, EXPANDABLE = "PYTORCH_ALLOC_CONF", "expandable_segments:True"
# What PyTorch 2.11 to 2.13 rejects together with expandable segments, and older names of the variable.
NO_EXPANDABLE = (
    "PYTORCH_CUDA_ALLOC_CONF PYTORCH_HIP_ALLOC_CONF TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK "
    "NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK"
).split()
RECORDER = "TORCH_FR_BUFFER_SIZE"


def set_torch_variables() -> None:
    """Set PyTorch's variables that the user has not set.

    The flight recorder keeps the last 2,000 collectives, for the report of a hang. Expandable segments let the GPU's memory
    be used in full by tensors whose sizes change, such as the tokens of an expert; CUDA graphs work with them.
    """
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:
        os.environ.setdefault(RECORDER, "2000")
    if "microsoft" not in platform.release().lower() and not any(name in os.environ for name in NO_EXPANDABLE):
        os.environ.setdefault(ALLOCATOR, EXPANDABLE)  # WSL's driver cannot map memory


def share_cores(info: RankInfo, on_gpu: bool, sysfs: Path = SYSFS) -> None:
    """Give each of a node's ranks its part of the cores: as many torch threads, bound to them if `divide` does.

    An affinity set by a launcher or Slurm is kept, as is an existing OMP_NUM_THREADS. Call before torch is imported.

    Args:
        on_gpu: False if the rank certainly trains on a CPU.
    """
    ranks = info.ranks_per_node
    gpus = gpu_addresses()[:ranks] if on_gpu else []
    if len(gpus) < ranks:  # each rank sees only its own
        gpus = []
    if ranks == 1 and not gpus:
        return
    threads = threads_per_rank(ranks, sysfs)
    if hasattr(os, "sched_setaffinity"):
        cpus = os.sched_getaffinity(0)
        if _is_bound(cpus, info):
            threads = threads_per_rank(1, sysfs)
        elif shares := divide(cpus, ranks, gpus, sysfs):
            os.environ[SHARED] = ",".join(map(str, sorted(cpus)))  # for processes not bound to this rank's cores
            os.sched_setaffinity(0, shares[info.local_rank])
            threads = threads_per_rank(1, sysfs)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def threads_per_rank(ranks: int, sysfs: Path = SYSFS) -> int:
    """Return the threads of each of `ranks` ranks that share this process's cores: one for each core, not for each CPU."""
    bindable = hasattr(os, "sched_getaffinity")
    cores = len(cores_of(os.sched_getaffinity(0), sysfs)) if bindable else os.cpu_count() or 1
    return max(1, cores // ranks)


def _is_bound(cpus: set[int], info: RankInfo) -> bool:
    """Return True if these CPUs are this rank's, not the job's.

    mpirun and Slurm may have bound a rank and its parent. torchrun and deepspeed start ranks with their own CPUs, which a
    container or the user may limit; `numactl` between them binds a rank.
    """
    if len(cpus) == os.cpu_count():
        return False
    return info.size_from != "WORLD_SIZE" or cpus != os.sched_getaffinity(os.getppid())
