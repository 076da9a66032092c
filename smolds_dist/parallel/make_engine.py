"""The choice between the two engines."""

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from smolds_dist.parallel.engine import Engine, Fill, GroupParameters, MakeOptimizer
from smolds_dist.parallel.local_engine import LocalEngine
from smolds_dist.parallel.topology import Topology
from smolds_dist.settings import RunConfig

if TYPE_CHECKING:  # the launcher needs no model, whose import takes a second
    from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM


def under_construction(
    config: RunConfig, topology: Topology, model_config: "DeepSeekV3Config"
) -> AbstractContextManager[None]:
    """Where a model is built that an engine is to fill: at ZeRO 3 every layer is cut as soon as it is there."""
    give_back_freed_memory()
    if topology.engine == "local" or topology.zero < 3:
        return nullcontext()
    from smolds_dist.parallel.deepspeed_engine import cut_while_building

    return cut_while_building(config, topology, model_config)


def make_engine(
    model: "DeepSeekV3ForCausalLM",
    config: RunConfig,
    topology: Topology,
    group_parameters: GroupParameters,
    make_optimizer: MakeOptimizer,
    fill: Fill | None = None,
) -> Engine:
    """The engine that `topology` names, with the model on its device and in its dtype.

    Args:
        fill: where the model's parameters hold nothing yet: gives each part that this process keeps its values.
    """
    engine: Engine
    if topology.engine == "local":
        engine = LocalEngine(model, config, topology, group_parameters, make_optimizer, fill)
    else:
        from smolds_dist.parallel.deepspeed_engine import DeepSpeedEngine  # needs deepspeed, which may not be here

        engine = DeepSpeedEngine(model, config, topology, group_parameters, make_optimizer, fill)
    if topology.device == "cpu" and topology.keeps_memory:
        keep_freed_memory()  # from here on: what was needed for the building goes back
    return engine


def keep_freed_memory() -> None:
    """Has glibc keep large blocks that are freed, for the next ones, in this process from now on (Linux).

    Left alone, it gives every large block back to the kernel and gets new pages for the next, all zeroed: for a step's
    temporary tensors that takes longer than what is computed in them. The price is what lies between blocks that are in use:
    measured with half a billion parameters on four ranks at ZeRO 3, 4.3 GB in place of 3.3.
    """
    _set_malloc(trim_threshold=-1, mmap_max=0)


def give_back_freed_memory() -> None:
    """Has glibc give every block of a megabyte back to the kernel as soon as it is freed (Linux).

    While a model is built, most of what is freed is never wanted again, and where memory is short it stays so. Left alone,
    glibc keeps blocks of up to 32 MB once it has seen some freed.
    """
    _set_malloc(trim_threshold=2**20, mmap_max=2**16, mmap_threshold=2**20)


def _set_malloc(**options: int) -> None:
    numbers = {"trim_threshold": -1, "mmap_threshold": -3, "mmap_max": -4}  # in malloc.h
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    for name, value in options.items():
        libc.mallopt(numbers[name], value)
