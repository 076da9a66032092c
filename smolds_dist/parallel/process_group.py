"""The ranks together: joining them, leaving them, and what needs no engine."""

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
    """Joins the other ranks, if the topology has a process group; False where `wait_policy` ended the waiting for them.

    Raises:
        ConfigError: where ranks are missing.
    """
    if topology.device == "cuda":
        torch.cuda.set_device(topology.local_rank)
    if topology.engine != "deepspeed":
        return True
    # One process with DeepSpeed has no launcher that tells it where to meet.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if topology.device == "cpu":
        # DeepSpeed would pick an installed GPU's accelerator whatever the run asked for.
        os.environ["DS_ACCELERATOR"] = "cpu"
    if topology.backend == "gloo" and topology.nodes > 1:
        # gloo would take the interface of this host's name, which is often the loopback.
        interface = interface_towards(os.environ["MASTER_ADDR"])
        if interface:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if topology.world_size > 1:
        # Held until the end of this function: torch's own store is the same server's.
        store = rendezvous(info, wait_policy or WaitPolicy())
        if store is None:
            return False
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed 0.19 calls collectives by the names that torch 2.13 renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    skip_shared_memory_build()
    deepspeed.init_distributed(dist_backend=topology.backend, verbose=False)
    return True


def end_process_group() -> None:
    """Leaves the other ranks, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def max_over_ranks(topology: Topology, value: int) -> int:
    """The largest of the ranks' values, below 2^24. Collective."""
    if topology.world_size == 1:
        return value
    largest = torch.tensor(float(value), device=topology.torch_device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest.item())


def end_rank(code: int) -> NoReturn:
    """Ends this process without tearing the interpreter down.

    torch 2.13's gloo threads let go of a collective's tensors after its caller has moved on. Where the interpreter is
    being torn down by then, a process whose run succeeded aborts (seen in one run of six). Can go when
    `ProcessGroupGloo::runLoop` drops its work before the work counts as done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
