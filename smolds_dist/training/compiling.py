"""torch.compile for the operations between matmuls: `train.compile`.

Each block's dense part (norms, projections, rotary embedding, attention around its kernel, residual) is compiled as one, as
are the regions inside the kernels (`model.regions`). The experts' matmuls and all-to-alls are not, because the number of
rows per expert is known only at run time; but on CUDA in one process, where rows are padded to a bound, each block is
compiled as a whole, with all shapes fixed. Tested on the CPU, also in CUDA's branches; untested on CUDA and MPS.
"""

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import cache_dir

from smolds_dist.activity import LONG, doing
from smolds_dist.architecture import LOGITS_CHUNK
from smolds_dist.costs.layout import layout_of
from smolds_dist.errors import first_line
from smolds_dist.model import DeepSeekV3Block, DeepSeekV3Config, device
from smolds_dist.model.kernels import _to_gradients, gated, gated_gradients
from smolds_dist.model.moe import DeepSeekMoE, _gradients_of_weighted_sum, _sum_of_rows, _weighted_sum, select_experts
from smolds_dist.model.regions import Backend, compile_regions, run_regions_eagerly
from smolds_dist.model.rotary import rotary_angles
from smolds_dist.observe.run_log import RunLog
from smolds_dist.parallel.captured import CudaRecorder
from smolds_dist.parallel.engine import Engine
from smolds_dist.parallel.local_engine import LocalEngine
from smolds_dist.parallel.process_group import max_over_ranks
from smolds_dist.parallel.topology import Topology
from smolds_dist.settings import RunConfig
from smolds_dist.training.step import Stepper

# Largest relative difference of gradient norms from the uncompiled model's: rounding changes some experts' rows.
COMPILED_TOLERANCE = 0.1
# Seconds of matmuls at peak rate from which a run is long enough to regain the compile time. On a GPU matmuls are a small
# part of a step and the compiled operations a large one.
MIN_SECONDS = {"cpu": 600, "cuda": 20}


def compile_model(
    stepper: Stepper,
    config: RunConfig,
    peak_seconds: float,
    has_compiler: bool,
    log: RunLog,
) -> bool:
    """Compile before the first step as `train.compile` says; return True if the model runs compiled. Collective.

    On each machine one rank compiles first, and the others find its results in PyTorch's cache on disk, as later runs do.
    If compiling fails, all ranks run uncompiled and one line logs why.

    Args:
        config: the settings of the stage that begins.
        peak_seconds: seconds of the rest of the run at the matmuls' peak rate.
        has_compiler: True if Inductor's compilers are installed on all hosts.
    """
    engine, topology = stepper.engine, stepper.topology
    model: Any = engine.model.config
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
                error = try_to_compile(
                    engine, topology, config.data.seq_len, model, documents=config.data.document_mask
                )
            engine.barrier()
    stepper.qk_clip.take()  # of these passes
    if failed := max_over_ranks(topology, error is not None):
        undo_compile(engine.model)
        log.warning(
            f"compiling failed ({error or 'on another rank'}); the run continues uncompiled (--train.compile off)"
        )
    else:
        log.info(f"compiled in {time.perf_counter() - began:.0f} s")
    return not failed


def capture_graphs(stepper: Stepper, config: RunConfig, log: RunLog) -> None:
    """Record each micro batch's passes as CUDA graphs, as `train.cuda_graphs` says. Only in one process: DeepSpeed's passes
    wait for the host."""
    topology, wanted = stepper.topology, config.train.cuda_graphs
    if wanted is False:
        return
    if not layout_of(config, topology).captured:
        if wanted is True:
            log.warning("--train.cuda_graphs needs one process on CUDA in bf16; the run continues without")
        return
    shape = topology.micro_batch, config.data.seq_len
    ids = torch.randint(0, stepper.engine.model.config.vocab_size, shape)  # type: ignore[arg-type, union-attr]
    try:
        with doing("recording CUDA graphs", LONG):
            stepper.capture(ids, CudaRecorder())
        log.info("micro batches run as CUDA graphs")
    except Exception as error:  # CUDA's and PyTorch's errors have no common class
        log.warning(
            f"recording CUDA graphs failed ({first_line(error)}); the run continues without (--train.cuda_graphs off)"
        )


def should_compile(setting: str | bool, device: str, peak_seconds: float, has_compiler: bool) -> bool:
    """Return True to compile; `auto` does if the run is long enough and a compiler is installed."""
    if isinstance(setting, bool):
        return setting
    return has_compiler and peak_seconds >= MIN_SECONDS.get(device, float("inf"))


def try_to_compile(
    engine: Engine,
    topology: Topology,
    seq_len: int,
    model: DeepSeekV3Config,
    backend: Backend = "inductor",
    documents: bool = False,
) -> str | None:
    """Compile everything training will call, by calling it; return the error, if any.

    Args:
        backend: torch.compile's; aot_eager traces without generating machine code.
        documents: attention stays within documents, whose code is not compiled.
    """
    separate_caches()
    tokens = topology.micro_batch, seq_len
    # On CUDA the number of rows does not depend on the routing.
    fixed = device.family(next(engine.model.parameters())) == "cuda"
    local = engine if fixed and isinstance(engine, LocalEngine) else None
    try:
        ids = torch.randint(0, model.vocab_size, tokens)
        expected = local.gradient_norms(ids) if local else torch.empty(0)
        compile_regions(backend, dynamic=not fixed)
        call_regions(model, topology, engine.device, tokens if fixed else None)
        if topology.zero < 3:  # ZeRO 3's hooks gather weights module by module
            call_blocks(engine, tokens, model, backend, fixed and topology.engine == "local", documents)
        if local and not torch.allclose(local.gradient_norms(ids), expected, rtol=COMPILED_TOLERANCE, atol=1e-6):
            return "the compiled model's gradients differ"
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


@torch.enable_grad()
def call_regions(
    config: DeepSeekV3Config, topology: Topology, place: torch.device, tokens: tuple[int, int] | None
) -> None:
    """Call the regions outside `DeepSeekV3Block.layer` and `attend` with the shapes that training passes.

    Args:
        tokens: sequences of a micro batch and their length, if the number of rows never changes; else any number will do.
    """
    H, width, K = config.hidden_size, config.intermediate_size, config.num_experts_per_tok
    dtype = torch.bfloat16 if topology.dtype == "bf16" else torch.float32

    def some(*shape: int, dtype: torch.dtype = dtype, grad: bool = False) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=place, requires_grad=grad)

    T, P = (math.prod(tokens) if tokens else 74), 160  # P differs from T and T x K, as it does in training
    dense = (config.dense_intermediate_size or 0) if config.first_k_dense_replace else 0
    for inner in {dense, config.n_shared_experts * width} - {0} if not tokens or topology.engine == "deepspeed" else ():
        gated(some(T, inner, grad=True), some(T, inner, grad=True)).sum().backward()
    if tokens:
        labels = tokens[0] * (tokens[1] - 1)
        chunk = LOGITS_CHUNK["cuda"]
        for rows in {min(labels, chunk), labels % chunk} - {0}:
            with torch.no_grad():
                _to_gradients(
                    some(rows, config.vocab_size), some(rows, 1, dtype=torch.long), some(rows, 1, dtype=torch.bool)
                )
        return
    inner_PJ = [some(P, 2 * width)] if topology.engine == "local" else [some(P, width), some(P, width)]
    with torch.no_grad():
        gated(*inner_PJ)
        gated_gradients(some(P, width), *inner_PJ)
    if topology.engine == "local":
        weights_TK, _ = select_experts(
            some(T, config.num_experts, dtype=torch.float32, grad=True), some(config.num_experts, dtype=torch.float32),
            config.scoring_func, K, config.norm_topk_prob, (config.n_group, config.topk_group),
        )  # fmt: skip
        weights_TK.sum().backward()
        row_TK, token_P, rows_PH = some(T, K, dtype=torch.long), some(P, dtype=torch.long), some(P, H, grad=True)
        weights_TK = weights_TK.detach().requires_grad_()
        with torch.no_grad():
            _sum_of_rows(some(P, H), row_TK)
            _weighted_sum(rows_PH, weights_TK, row_TK)
            _gradients_of_weighted_sum(some(T, H), rows_PH, weights_TK, token_P, row_TK)


def call_blocks(
    engine: Engine, tokens: tuple[int, int], config: DeepSeekV3Config, backend: Backend, full: bool, documents: bool
) -> None:
    """Run forward and backward of each block's compiled part, without weight gradients; the others reuse the first's code.

    Args:
        tokens: sequences of a micro batch, and their length.
        full: compile experts too: blocks as one region, unless a part is recomputed or attention stays within documents.
        documents: attention stays within documents.
    """
    blocks = blocks_of(engine.model)
    weight = next(blocks[0].self_attn.parameters())
    x = torch.zeros(*tokens, config.hidden_size, dtype=weight.dtype, device=weight.device)
    positions = torch.arange(tokens[1], device=weight.device)[None]
    rotary = rotary_angles(positions, config.rotary_dim, config.rope_theta, config.rope_scaling)
    inputs = dict(rotary=rotary, attention_mask=None, cache=None, output_attentions=False, documents=None)
    for block in blocks:
        whole = full and block.recomputed == "none" and not documents
        part: Any = torch.compile(block.layer if whole else block.attend, dynamic=False, backend=backend)
        block.compiled_attend, block.compiled_layer = (None, part) if whole else (part, None)
        x.requires_grad_()
        outputs = [one for one in part(x, **inputs) if one.requires_grad]
        torch.autograd.grad(outputs, x, [torch.zeros_like(one) for one in outputs])
        x = outputs[0].detach()
        if full and not whole and isinstance(block.mlp, DeepSeekMoE):
            block.mlp.compiled_mix = torch.compile(block.mlp.mix, dynamic=False, backend=backend)
            normed = outputs[1].detach().requires_grad_()
            torch.autograd.grad(block.mlp(normed), normed, torch.zeros_like(normed))


def blocks_of(model: nn.Module) -> list[DeepSeekV3Block]:
    return [module for module in model.modules() if isinstance(module, DeepSeekV3Block)]


def undo_compile(model: nn.Module) -> None:
    """Return to uncompiled code."""
    run_regions_eagerly()
    for block in blocks_of(model):
        block.compiled_attend = block.compiled_layer = block.mlp.compiled_mix = None
