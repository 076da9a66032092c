"""torch.compile for what runs between matrix products: `train.compile`.

Each block's dense part (norms, projections, rotary embedding, attention around its kernel, residual) is compiled as one, and
so are the regions inside the kernels (`model.regions`). The experts' products and their all-to-all are not: how many rows
an expert gets is known only when it gets them. On CUDA and MPS this has not been tested.
"""

import importlib.util
import os
import shutil
import time
from typing import Any

import torch
from torch import nn

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

# Seconds of matrix products at their peak from which a run is long enough to win back what compiling takes. On a GPU the
# products are a small part of a step, and what is compiled a large one.
MIN_SECONDS = {"cpu": 600, "cuda": 60}


def compile_model(
    engine: Engine,
    config: RunConfig,
    topology: Topology,
    model: DeepSeekV3Config,
    peak_seconds: float,
    log: RunLog,
) -> bool:
    """Compiles where `train.compile` says so, before the first step; returns whether the model runs compiled. Collective.

    On each machine one rank compiles first, and the others find its results in PyTorch's cache on disk, as later runs do.
    Where compiling fails, all ranks run uncompiled, and one line tells why.

    Args:
        peak_seconds: of the rest of the run, were it nothing but matrix products at their peak.
    """
    # Under selective checkpointing, which looks at every operator, all would be compiled once more in the first step.
    selective = config.train.activation_checkpointing == "selective"
    if selective or not should_compile(config.train.compile, topology.device, peak_seconds):
        return False
    began = time.perf_counter()
    log.info("compiling; what is compiled is kept in PyTorch's cache for later runs")
    error = None
    for turn in (True, False):
        if turn == (topology.local_rank == 0):
            error = try_to_compile(engine, topology, config.data.seq_len, model)
        engine.barrier()
    if failed := max_over_ranks(topology, error is not None):
        leave_uncompiled(engine.model)
        log.warning(f"compiling failed ({error or 'on another rank'}); the run goes on without (--train.compile off)")
    else:
        log.info(f"compiled in {time.perf_counter() - began:.0f} s")
    return not failed


def should_compile(setting: str | bool, device: str, peak_seconds: float) -> bool:
    """Whether to compile: `auto` does for runs that are long enough, where a compiler is found."""
    if isinstance(setting, bool):
        return setting
    return peak_seconds >= MIN_SECONDS.get(device, float("inf")) and has_compiler(device)


def has_compiler(device: str) -> bool:
    """Inductor makes C++ for CPUs and Triton's kernels for CUDA, whose launchers are C."""
    if device == "cuda":
        return importlib.util.find_spec("triton") is not None and any(map(shutil.which, ("gcc", "clang")))
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))


def try_to_compile(
    engine: Engine, topology: Topology, seq_len: int, model: DeepSeekV3Config, backend: str = "inductor"
) -> str | None:
    """Compiles all that training will call, by calling it; returns what went wrong.

    Args:
        backend: torch.compile's; aot_eager traces all the same, and makes no machine code.
    """
    try:
        compile_regions(backend)
        call_regions(model, topology)
        if topology.zero < 3:  # whose hooks gather the weights, module by module
            call_dense_parts(engine, topology, seq_len, model, backend)
    except Exception as error:  # whatever a compiler may raise
        return first_line(error)
    return None


def call_regions(config: DeepSeekV3Config, topology: Topology) -> None:
    """Forward and backward of a model of one or two layers, which has every region that the whole one has; and of experts
    whose gate and up are two weights, as AutoEP has them."""
    dense = min(1, config.first_k_dense_replace)
    few = {"num_hidden_layers": dense + 1, "first_k_dense_replace": dense}
    dtype = torch.bfloat16 if topology.dtype == "bf16" else torch.float32
    with torch.random.fork_rng(devices=[]):
        model: Any = DeepSeekV3ForCausalLM(DeepSeekV3Config.from_dict(config.to_dict() | few))
    model = model.to(topology.torch_device).train()
    for parameter in model.parameters():  # alone: buffers hold selection biases, which stay fp32
        parameter.data = parameter.data.to(dtype)
    ids = torch.arange(74, device=model.device).view(2, 37) % config.vocab_size
    model(input_ids=ids, labels=ids).loss.backward()
    if topology.engine == "deepspeed":
        experts = model.model.layers[-1].mlp.experts
        x_PH = model.get_input_embeddings().weight[:64]
        counts_E = torch.tensor([64, *[0] * (config.num_experts - 1)], device=model.device)
        expert_ffn(x_PH, counts_E, experts.gate_up_proj.chunk(2, dim=1), experts.down_proj).sum().backward()


def call_dense_parts(engine: Engine, topology: Topology, seq_len: int, config: DeepSeekV3Config, backend: str) -> None:
    """Forward and backward of each block's dense part; what the first leaves serves the others. Weights get no gradient."""
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


def leave_uncompiled(model: nn.Module) -> None:
    """Takes back what was compiled."""
    run_regions_eagerly()
    for block in dense_parts(model):
        block.compiled_attend = None
