"""The choice between the two engines."""

import ctypes
import sys
from typing import TYPE_CHECKING

from smolds_dist.parallel.engine import Engine, GroupParameters, MakeOptimizer
from smolds_dist.parallel.local_engine import LocalEngine
from smolds_dist.parallel.topology import Topology
from smolds_dist.settings import RunConfig

if TYPE_CHECKING:  # the launcher needs no model, whose import takes a second
    from smolds_dist.model import DeepSeekV3ForCausalLM


def make_engine(
    model: "DeepSeekV3ForCausalLM",
    config: RunConfig,
    topology: Topology,
    group_parameters: GroupParameters,
    make_optimizer: MakeOptimizer,
) -> Engine:
    """The engine that `topology` names, with the model on its device and in its dtype."""
    if topology.device == "cpu":
        keep_freed_memory()
    if topology.engine == "local":
        return LocalEngine(model, config, topology, group_parameters, make_optimizer)
    from smolds_dist.parallel.deepspeed_engine import DeepSpeedEngine  # needs deepspeed, which may not be here

    return DeepSpeedEngine(model, config, topology, group_parameters, make_optimizer)


def keep_freed_memory() -> None:
    """Has glibc keep large blocks that are freed, for the next ones, in this process from now on (Linux).

    Left alone, it gives every large block back to the kernel and gets new pages for the next, all zeroed: for a step's
    temporary tensors that takes longer than what is computed in them.
    """
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        return
    trim_threshold, mmap_max = -1, -4  # parameters' numbers in malloc.h
    ctypes.CDLL(None).mallopt(mmap_max, 0)
    ctypes.CDLL(None).mallopt(trim_threshold, -1)
