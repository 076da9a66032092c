"""torch.compile for the operations between matmuls: `train.compile`.

Each block's dense part (norms, projections, rotary embedding, attention around its kernel, residual) is compiled as one, as
are the regions inside the kernels (`model.regions`). The experts' matmuls and all-to-alls are not, because the number of
rows per expert is known only at run time. Untested on CUDA and MPS.
"""

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor.runtime.cache_dir_utils import cache_dir

from smolds_dist.activity import LONG, doing
from smolds_dist.errors import first_line
from smolds_dist.model import DeepSeekV3Block, DeepSeekV3Config, DeepSeekV3ForCausalLM
from smolds_dist.model.kernels import expert_ffn
from smolds_dist.model.regions import compile_regions, run_regions_eagerly
from smolds_dist.model.rotary import rotary_angles
from smolds_dist.observe.run_log import RunLog
from smolds_dist.parallel.engine import Engine
from smolds_dist.parallel.process_group import max_over_ranks
from smolds_dist.parallel.topology import Topology
from smolds_dist.settings import RunConfig

# Seconds of matmuls at peak rate from which a run is long enough to regain the compile time. On a GPU matmuls are a small
# part of a step and the compiled operations a large one.
MIN_SECONDS = {"cpu": 600, "cuda": 60}


def compile_model(
    engine: Engine,
    config: RunConfig,
    topology: Topology,
    model: DeepSeekV3Config,
    peak_seconds: float,
    has_compiler: bool,
    log: RunLog,
) -> bool:
    """Compile before the first step as `train.compile` says; return True if the model runs compiled. Collective.

    On each machine one rank compiles first, and the others find its results in PyTorch's cache on disk, as later runs do.
    If compiling fails, all ranks run uncompiled and one line logs why.

    Args:
        peak_seconds: seconds of the rest of the run at the matmuls' peak rate.
        has_compiler: True if Inductor's compilers are installed on all hosts.
    """
    # Selective checkpointing intercepts every operator, so everything would be recompiled in the first step.
    selective = config.train.activation_checkpointing == "selective"
    if selective or not should_compile(config.train.compile, topology.device, peak_seconds, has_compiler):
        return False
    began = time.perf_counter()
    log.info("compiling; PyTorch's cache keeps the result for later runs")
    error = None
    with doing("compiling", LONG):
        for turn in (True, False):
            if turn == (topology.local_rank == 0):
                error = try_to_compile(engine, topology, config.data.seq_len, model)
            engine.barrier()
    if failed := max_over_ranks(topology, error is not None):
        undo_compile(engine.model)
        log.warning(
            f"compiling failed ({error or 'on another rank'}); the run continues uncompiled (--train.compile off)"
        )
    else:
        log.info(f"compiled in {time.perf_counter() - began:.0f} s")
    return not failed


def should_compile(setting: str | bool, device: str, peak_seconds: float, has_compiler: bool) -> bool:
    """Return True to compile; `auto` does if the run is long enough and a compiler is installed."""
    if isinstance(setting, bool):
        return setting
    return has_compiler and peak_seconds >= MIN_SECONDS.get(device, float("inf"))


def try_to_compile(
    engine: Engine, topology: Topology, seq_len: int, model: DeepSeekV3Config, backend: str = "inductor"
) -> str | None:
    """Compile everything training will call, by calling it; return the error, if any.

    Args:
        backend: torch.compile's; aot_eager traces without generating machine code.
    """
    separate_caches()
    try:
        compile_regions(backend)
        call_regions(model, topology)
        if topology.zero < 3:  # ZeRO 3's hooks gather weights module by module
            call_dense_parts(engine, topology, seq_len, model, backend)
    except Exception as error:  # compilers may raise anything
        return first_line(error)
    return None


def separate_caches() -> None:
    """Give each CPU instruction set its own folder in Inductor's cache, for this process and its children.

    Inductor's key of a cached graph (torch 2.13) lacks the vector width: on a cache shared with another kind of CPU, as in a
    home folder of a cluster, the process crashes. Remove this once the key has it.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    folder = Path(cache_dir())
    if folder.name != capability:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / capability)


def call_regions(config: DeepSeekV3Config, topology: Topology) -> None:
    """Run forward and backward of a model of one or two layers, which has all regions of the full one, and of experts with
    separate gate and up weights, as in AutoEP."""
    dense = min(1, config.first_k_dense_replace)
    few = {"num_hidden_layers": dense + 1, "first_k_dense_replace": dense}
    dtype = torch.bfloat16 if topology.dtype == "bf16" else torch.float32
    with torch.random.fork_rng(devices=[]):
        model: Any = DeepSeekV3ForCausalLM(DeepSeekV3Config.from_dict(config.to_dict() | few))
    model = model.to(topology.torch_device).train()
    for parameter in model.parameters():  # only: selection biases are buffers and stay fp32
        parameter.data = parameter.data.to(dtype)
    ids = torch.arange(74, device=model.device).view(2, 37) % config.vocab_size
    model(input_ids=ids, labels=ids).loss.backward()
    if topology.engine == "deepspeed":
        experts = model.model.layers[-1].mlp.experts
        x_PH = model.get_input_embeddings().weight[:64]
        counts_E = torch.tensor([64, *[0] * (config.num_experts - 1)], device=model.device)
        expert_ffn(x_PH, counts_E, experts.gate_up_proj.chunk(2, dim=1), experts.down_proj).sum().backward()


def call_dense_parts(engine: Engine, topology: Topology, seq_len: int, config: DeepSeekV3Config, backend: str) -> None:
    """Run forward and backward of each block's dense part, without weight gradients; the others reuse the first's code."""
    blocks = dense_parts(engine.model)
    weight = next(blocks[0].self_attn.parameters())
    x = torch.zeros(topology.micro_batch, seq_len, config.hidden_size, dtype=weight.dtype, device=weight.device)
    positions = torch.arange(seq_len, device=weight.device)[None]
    rotary = rotary_angles(positions, config.rotary_dim, config.rope_theta, config.rope_scaling)
    inputs = dict(rotary=rotary, attention_mask=None, cache=None, output_attentions=False, documents=None)
    for block in blocks:
        block.compiled_attend = attend = torch.compile(block.attend, dynamic=False, backend=backend)
        x.requires_grad_()
        outputs = attend(x, **inputs)
        torch.autograd.grad(outputs, x, [torch.zeros_like(one) for one in outputs])
        x = outputs[0].detach()


def dense_parts(model: nn.Module) -> list[DeepSeekV3Block]:
    return [module for module in model.modules() if isinstance(module, DeepSeekV3Block)]


def undo_compile(model: nn.Module) -> None:
    """Return to uncompiled code."""
    run_regions_eagerly()
    for block in dense_parts(model):
        block.compiled_attend = None
