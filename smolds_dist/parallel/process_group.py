"""Join and leave the process group, and collectives that need no engine."""

import os
import sys
import warnings
from typing import NoReturn

import torch
import torch.distributed as dist

from smolds_dist.parallel.expert_parallel import skip_shared_memory_build
from smolds_dist.parallel.ranks import RankInfo, interface_towards
from smolds_dist.parallel.rendezvous import WaitPolicy, rendezvous
from smolds_dist.parallel.topology import Topology


def start_process_group(topology: Topology, info: RankInfo, wait_policy: WaitPolicy | None = None) -> bool:
    """Join the topology's process group, if it has one; return False if `wait_policy` ended the wait.

    Raises:
        ConfigError: if ranks are missing.
    """
    if topology.device == "cuda":
        torch.cuda.set_device(topology.device_index)
    if topology.engine != "deepspeed":
        return True
    # One process with DeepSpeed has no launcher that sets these.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if topology.device == "cuda":
        os.environ["LOCAL_RANK"] = str(topology.device_index)  # DeepSpeed takes it for the GPU's index
    if topology.device == "cpu":
        # Otherwise DeepSpeed would use an installed GPU.
        os.environ["DS_ACCELERATOR"] = "cpu"
    if topology.backend == "gloo" and topology.nodes > 1:
        # gloo's default is the interface of this host's name, often the loopback.
        interface = interface_towards(os.environ["MASTER_ADDR"])
        if interface:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if topology.world_size > 1:
        # Kept until the end of this function, because torch's own store uses the same server.
        store = rendezvous(info, wait_policy or WaitPolicy())
        if store is None:
            return False
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    skip_shared_memory_build()
    deepspeed.init_distributed(dist_backend=topology.backend, verbose=False)
    return True


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
