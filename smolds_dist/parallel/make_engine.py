"""Create the run's engine around a new or an existing model."""

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext

from smolds_dist.model import DeepSeekV3Config, DeepSeekV3ForCausalLM, empty_model, enable_activation_checkpointing
from smolds_dist.parallel.engine import Engine, Fill
from smolds_dist.parallel.local_engine import LocalEngine
from smolds_dist.parallel.topology import Topology
from smolds_dist.parallel.uniform_routing import force_uniform_routing
from smolds_dist.settings import RunConfig


def build_engine(model_config: DeepSeekV3Config, config: RunConfig, topology: Topology, fill: Fill) -> Engine:
    """Create the engine around a new model; at ZeRO 3 each layer is sharded as soon as it is built.

    Args:
        fill: writes the values of each local slice.
    """
    release_freed_memory()
    sharded: AbstractContextManager[None] = nullcontext()
    if topology.engine == "deepspeed" and topology.zero == 3:
        from smolds_dist.parallel.deepspeed_engine import zero3_init

        sharded = zero3_init(config, topology, model_config)
    with sharded:
        model = empty_model(model_config)
    return make_engine(model, config, topology, fill)


def make_engine(
    model: DeepSeekV3ForCausalLM, config: RunConfig, topology: Topology, fill: Fill | None = None
) -> Engine:
    """Create the engine that `topology` names around `model`, on its device, in its dtype, with its optimizer.

    Args:
        fill: for a model with uninitialized parameters: writes the values of each local slice.
    """
    enable_activation_checkpointing(model, config.train.activation_checkpointing)
    engine: Engine
    if topology.engine == "local":
        engine = LocalEngine(model, config.train, topology, fill)
    else:
        from smolds_dist.parallel.deepspeed_engine import DeepSpeedEngine  # deepspeed may not be installed

        engine = DeepSpeedEngine(model, config, topology, fill)
    if config.model.force_uniform_routing:
        force_uniform_routing(engine.model)
    if topology.device == "cpu" and topology.keeps_memory:
        retain_freed_memory()  # only now, so that memory used for building is returned
    return engine


def retain_freed_memory() -> None:
    """Have glibc keep large freed blocks in this process for reuse from now on (Linux).

    By default it returns every large block to the kernel and gets zeroed pages for the next one, which takes longer than
    computing a step's temporary tensors. The cost is fragmentation: with half a billion parameters on four ranks at ZeRO 3,
    4.3 GB instead of 3.3.
    """
    _configure_malloc(trim_threshold=-1, mmap_max=0)


def release_freed_memory() -> None:
    """Have glibc return every block of at least 1 MB to the kernel as soon as it is freed (Linux).

    Most memory freed while a model is built is not reused, which matters if memory is short. By default glibc keeps blocks
    of up to 32 MB once some have been freed.
    """
    _configure_malloc(trim_threshold=2**20, mmap_max=2**16, mmap_threshold=2**20)


def _configure_malloc(**options: int) -> None:
    numbers = {"trim_threshold": -1, "mmap_threshold": -3, "mmap_max": -4}  # from malloc.h
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    for name, value in options.items():
        libc.mallopt(numbers[name], value)
