"""Join and leave the process group, and collectives that need no engine."""

import os
import re
import sys
import warnings
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from smolds_dist.activity import LONG, doing
from smolds_dist.errors import ConfigError, first_line
from smolds_dist.parallel.expert_parallel import choose_accelerator, skip_shared_memory_build
from smolds_dist.parallel.rank_environment import ALLOCATOR, EXPANDABLE
from smolds_dist.parallel.topology import Topology
from smolds_dist.progress import print_line

# The watchdog (`launching.failure`) ends a hung job. A collective must outlast what a rank may do while others wait in it.
MIN_TIMEOUT = timedelta(days=1)


def start_process_group(topology: Topology, timeout: float = 0.0) -> None:
    """Join the topology's process group, if it has one.

    Args:
        timeout: of the collectives, in seconds; at least `MIN_TIMEOUT`.
    """
    if topology.device == "cuda":
        torch.cuda.set_device(topology.device_index)
        _check_allocator()
    if topology.engine != "deepspeed":
        return
    # One process with DeepSpeed has no launcher that sets these.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if topology.device == "cuda":
        # DeepSpeed takes it for the GPU's index, to which it binds the process group (`device_id`).
        os.environ["LOCAL_RANK"] = str(topology.device_index)
    choose_accelerator(topology)
    with doing("importing deepspeed", LONG):
        import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    skip_shared_memory_build()
    longest = max(MIN_TIMEOUT, timedelta(seconds=timeout))
    try:
        with doing("joining the process group"):
            deepspeed.init_distributed(dist_backend=topology.backend, verbose=False, timeout=longest)
    except dist.DistBackendError as error:
        if shared := re.search("Duplicate GPU.*", str(error)):
            raise ConfigError(
                f"NCCL: {shared[0].strip().rstrip('.')}; start one rank per GPU, each with its own (LOCAL_RANK, or "
                "CUDA_VISIBLE_DEVICES)."
            ) from None
        raise


def _check_allocator() -> None:
    """Turn our default of expandable segments off on a GPU whose driver cannot map memory, such as some virtual GPUs.

    Untested on CUDA.
    """
    try:
        torch.empty(1, device="cuda")
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or os.environ.get(ALLOCATOR) != EXPANDABLE:
            raise
        why = f"which this GPU rejects ({first_line(error)})"
        print_line(f"smolds: training without expandable segments, {why}", sys.stderr)
        torch._C._accelerator_setAllocatorSettings(EXPANDABLE.replace("True", "False"))


def set_group_timeouts(timeout: float) -> None:
    """Set the timeout of collectives, in seconds and at least `MIN_TIMEOUT`, in all process groups.

    DeepSpeed 0.19 creates its groups without a timeout, and torch 2.13 then takes its default instead of the first group's:
    10 minutes over NCCL, 30 over gloo. Remove when `deepspeed.comm.new_group` has a timeout.
    """
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(max(MIN_TIMEOUT, timedelta(seconds=timeout)), group)


def end_process_group() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def max_over_ranks(topology: Topology, value: int) -> int:
    """Return the largest of the ranks' values, which are below 2^24. Collective."""
    if topology.world_size == 1:
        return value
    largest = torch.tensor(float(value), device=topology.torch_device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest.item())


def end_rank(code: int) -> NoReturn:
    """Exit without interpreter teardown.

    torch 2.13's gloo threads may free a collective's tensors after its caller has continued. If that happens during
    teardown, a process whose run succeeded aborts (seen in one run of six). Remove when `ProcessGroupGloo::runLoop` drops
    its work before marking it done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
