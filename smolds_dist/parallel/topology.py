"""The topology of a run: device, backend, data x expert layout, ZeRO stage, dtype and micro batch, as pure functions.

A node's ranks and DeepSpeed's expert groups are consecutive: a group is inside a node if and only if its size divides the
ranks per node.

Only `detect_machine` reads the hardware; `plan_topology` depends only on its arguments.
"""

import importlib.util
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from smolds_dist.architecture import divisors
from smolds_dist.costs.hardware import Hardware, known_hardware, load_hardware
from smolds_dist.costs.layout import Layout, configured
from smolds_dist.costs.memory import MEMORY_SHARE, PROCESS_BYTES, rank_memory, with_vocabulary
from smolds_dist.costs.step_time import step_time
from smolds_dist.errors import ConfigError
from smolds_dist.parallel.control_groups import memory_limit
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.settings import Model, Parallel, RunConfig
from smolds_dist.stages import StageSpan, resolve_stages

# Tokens per forward pass that use the device fully without filling its memory with activations
TOKENS_PER_PASS = {"cpu": 4096, "mps": 4096, "cuda": 16384}


@dataclass(frozen=True)
class Machine:
    """The devices of this machine."""

    devices: tuple[str, ...]  # kinds, best first; "cpu" is always the last
    device_count: int  # of the best kind; for the CPU, its cores
    bf16: bool  # True if bf16 matmuls on the best kind are at least as fast as fp32
    memory: int | None = None  # bytes of one device of the best kind; for the CPU, of the machine or its cgroup
    name: str | None = None  # PyTorch's name of the best kind; "cpu" for the CPU
    compiler: bool = True  # True if Inductor's compilers are installed


@dataclass(frozen=True)
class Topology:
    """The validated layout of a run; the same on all ranks except `rank`, `local_rank` and `device_index`."""

    rank: int
    local_rank: int
    world_size: int
    device: str  # cpu, cuda or mps
    backend: str | None  # nccl, gloo, or None for a single process without a process group
    engine: str  # local or deepspeed
    expert: int  # ranks that share one set of experts
    zero: int
    dtype: str  # fp32 or bf16
    micro_batch: int  # sequences per forward pass of one rank; like the next field, of the run's first stage (`at`)
    accumulation: int  # forward passes per step of one rank
    nodes: int = 1
    device_index: int = 0  # of the rank's GPU, among those that it can access
    keeps_memory: bool = True  # on a CPU, the process keeps freed memory for reuse
    micro_batches: Sequence[int] = ()  # of each stage, if there are several
    reason: str = ""  # the reasons for this layout in one sentence

    @property
    def torch_device(self) -> str:
        return f"cuda:{self.device_index}" if self.device == "cuda" else self.device

    @property
    def per_rank(self) -> int:
        """Sequences per rank and step."""
        return self.micro_batch * self.accumulation

    def at(self, stage: StageSpan) -> "Topology":
        """Return the layout in a stage of the run."""
        if not self.micro_batches:
            return self
        size = self.micro_batches[stage.number - 1]
        return replace(self, micro_batch=size, accumulation=stage.global_batch // (self.world_size * size))

    def __str__(self) -> str:
        nodes = f" on {self.nodes} nodes," if self.nodes > 1 else ""
        ranks = "1 process" if self.world_size == 1 else f"{self.world_size} ranks over {self.backend}"
        engine = "plain PyTorch" if self.engine == "local" else f"DeepSpeed ZeRO {self.zero}"
        return (
            f"{ranks}{nodes} on {self.device}, {engine}, expert parallel size {self.expert}, {self.dtype}, "
            f"{self.world_size} x {self.accumulation} x {self.micro_batch} sequences per step"
        )


def detect_machine() -> Machine:
    """Detect the hardware with torch."""
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        name, count = torch.cuda.get_device_name(0), torch.cuda.device_count()
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # V100 and T4 emulate it
        return Machine(("cuda", "cpu"), count, bf16, total, name, has_compiler("cuda"))
    if torch.backends.mps.is_available():
        return Machine(("mps", "cpu"), 1, False, torch.mps.recommended_max_memory())
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    memory = min(filter(None, (installed, memory_limit())), default=None)
    # PyTorch has fast bf16 matmuls on x86 only from AVX-512 on; measured with AVX2, one took 20 times as long as in fp32.
    bf16 = torch.backends.cpu.get_cpu_capability() not in ("AVX2", "NO AVX")
    return Machine(("cpu",), available_cores(), bf16, memory, "cpu", has_compiler("cpu"))


def has_compiler(device: str) -> bool:
    """Return True if Inductor's compilers are installed: C++ for CPUs; Triton, with C launchers, for CUDA."""
    if device == "cuda":
        return importlib.util.find_spec("triton") is not None and any(map(shutil.which, ("gcc", "clang")))
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))


def available_cores() -> int:
    """Return the number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plan_topology(config: RunConfig, machine: Machine, rank: RankInfo) -> Topology:
    """Fill in the configuration's "auto" values and check the others.

    Raises:
        ConfigError: if a setting cannot work at this world size or on this machine, with the valid values.
    """
    parallel, world, per_node = config.parallel, rank.world_size, rank.ranks_per_node
    device = choose_device(parallel.device, machine, rank)
    hardware = _hardware(parallel, machine, device)
    engine = _engine(parallel, world)
    dtype: str = config.train.dtype
    if dtype == "auto":
        dtype = "bf16" if device == "cuda" and machine.bf16 else "fp32"
    experts = config.model.num_experts
    sizes, why_expert = _expert_sizes(parallel.expert, experts, world, per_node)
    stages = _zero_stages(parallel.zero, engine)
    memory = Memory(with_vocabulary(config), _memory(machine, device, per_node), PROCESS_BYTES[device])
    spans = resolve_stages(config).spans

    def layouts(span: StageSpan, size: int, zeros: list[int]) -> list[Layout]:
        batch, seq_len, settings = span.global_batch, span.seq_len, configured(span.config)
        with span.named_in_errors():
            sizes = _micro_batches(span.config, world, TOKENS_PER_PASS[device] // seq_len)
        return [
            Layout(world, per_node, size, zero, one, batch // (world * one), seq_len, dtype, device, engine, **settings)
            for one in sizes
            for zero in zeros
        ]

    # The stage that needs the most memory decides, by the layouts that need the least.
    worst = (
        max(spans, key=lambda span: min(map(memory.need, layouts(span, sizes[-1], stages)))) if spans[1:] else spans[0]
    )

    def first(size: int) -> Layout:
        return memory.first(layouts(worst, size, stages))

    expert = sizes[-1]
    if len(sizes) > 1:
        if hardware is None:
            why_expert += ", without this machine's specs, which smolds plan --calibrate measures"
        else:
            firsts = {size: first(size) for size in sizes}
            expert, why_expert = _fastest_layout(memory, experts, firsts, hardware.shared_by(per_node))
    chosen = first(expert)
    batches = [memory.first(layouts(span, expert, [chosen.zero])).micro_batch for span in spans]
    keeps_memory = memory.fits(chosen) if parallel.keep_memory == "auto" else parallel.keep_memory
    why = _explain_stage(chosen, parallel.zero != "auto", memory) + _warnings(machine, device, dtype, keeps_memory)
    return Topology(
        rank=rank.rank,
        local_rank=rank.local_rank,
        device_index=device_index(machine, rank),
        world_size=world,
        device=device,
        backend=None if engine == "local" else "nccl" if device == "cuda" else "gloo",
        engine=engine,
        expert=expert,
        zero=chosen.zero,
        dtype=dtype,
        micro_batch=batches[0],
        accumulation=spans[0].global_batch // (world * batches[0]),
        micro_batches=tuple(batches) if batches[1:] else (),
        nodes=-(-world // per_node),
        keeps_memory=keeps_memory,
        reason=f"{why_expert}; {why}." if world > 1 else f"{why}.",
    )


def _hardware(parallel: Parallel, machine: Machine, device: str) -> Hardware | None:
    """Return the specs that the planner's formulas take, if known."""
    if parallel.hardware:
        return load_hardware(parallel.hardware)
    return None if machine.name is None else known_hardware("cpu" if device == "cpu" else machine.name)


def _warnings(machine: Machine, device: str, dtype: str, keeps_memory: bool) -> str:
    text = ""
    if device == "cpu" and not keeps_memory:
        text += "; freed memory is returned to the system after each step, which takes time"
    if device in ("cpu", "cuda") and device == machine.devices[0] and dtype == "bf16" and not machine.bf16:
        kind = "CPU" if device == "cpu" else "GPU"
        text += f"; fp32 would be faster, because this {kind} has no bf16 matmuls: omit --train.dtype"
    return text


def choose_device(wanted: str, machine: Machine, rank: RankInfo) -> str:
    """Return the kind of device a rank trains on; raise a `ConfigError` if its machine has none for it."""
    device = machine.devices[0] if wanted == "auto" else wanted
    if device not in machine.devices:
        raise ConfigError(f"--parallel.device {device} is not on this machine; use {' or '.join(machine.devices)}.")
    if device == "cuda" and device_index(machine, rank) >= machine.device_count:
        raise ConfigError(
            f"local rank {rank.local_rank} has no GPU, because this node has {machine.device_count}; start fewer ranks."
        )
    if device == "mps" and rank.world_size > 1:
        raise ConfigError("Apple's GPU supports one process; start one, or use --parallel.device cpu.")
    return device


def device_index(machine: Machine, rank: RankInfo) -> int:
    """Return the index of a rank's GPU: its local rank, or 0 if Slurm shows each rank only its own (`--gpus-per-task`)."""
    return 0 if machine.device_count == 1 and rank.local_rank < rank.gpus_on_node else rank.local_rank


def _memory(machine: Machine, device: str, per_node: int) -> int | None:
    """Return one rank's available memory in bytes, if known."""
    if machine.memory is None or device != machine.devices[0]:
        return None
    return machine.memory // per_node if device == "cpu" else machine.memory


class Memory:
    """Estimates the memory that layouts need per rank, by `costs.memory`.

    Args:
        available: bytes; None if unknown.
        process: bytes that a process uses before it has a model.
    """

    def __init__(self, model: Model, available: int | None, process: float):
        self.model, self.available = model, available
        self.need = cache(lambda layout: rank_memory(model, layout, process).total)

    def fits(self, layout: Layout) -> bool:
        """Return True if the layout fits, or the available memory is unknown."""
        return self.available is None or self.need(layout) <= MEMORY_SHARE * self.available

    def first(self, layouts: list[Layout]) -> Layout:
        """Return the first layout that fits, else the one that needs the least memory."""
        return next(filter(self.fits, layouts), None) or min(layouts, key=self.need)


def expert_sizes(world_size: int, num_experts: int) -> list[int]:
    """Return the expert-parallel sizes that divide both the ranks and the experts."""
    common = math.gcd(world_size, num_experts)
    return [size for size in range(1, common + 1) if common % size == 0]


def _engine(parallel: Parallel, world: int) -> str:
    if parallel.engine == "local" and world > 1:
        raise ConfigError(f"--parallel.engine local is for one process, not {world} ranks; use deepspeed or auto.")
    if parallel.engine != "auto":
        return parallel.engine
    wants_deepspeed = parallel.zero not in ("auto", 0) or parallel.ds_config is not None
    return "deepspeed" if world > 1 or wants_deepspeed else "local"


def _expert_sizes(wanted: str | int, experts: int, world: int, per_node: int) -> tuple[list[int], str]:
    """Return the allowed expert-parallel sizes, the largest last, and the reason for the largest. Groups stay inside a node
    unless set otherwise."""
    valid = expert_sizes(world, experts)
    inside = [size for size in valid if per_node % size == 0]
    if not isinstance(wanted, int):
        sizes = inside if wanted == "auto" else inside[-1:]
        if inside[-1] == 1:
            return sizes, f"every rank holds all {experts} experts, because no larger group fits evenly into a node"
        where = f" inside a node of {per_node}" if per_node < world else ""
        return sizes, f"{experts} experts are sharded over {inside[-1]} ranks{where}, the most that divide evenly"
    if wanted not in valid:
        raise ConfigError(
            f"--parallel.expert {wanted} must divide the world size ({world}) and the number of experts ({experts}); "
            f"valid values: {', '.join(map(str, valid))}. `smolds launch` starts several ranks."
        )
    where = "" if wanted in inside else f", across nodes of {per_node}, whose links are slower"
    return [wanted], f"{experts} experts are sharded over {wanted} ranks as set{where}"


def _fastest_layout(memory: Memory, experts: int, layouts: dict[int, Layout], hardware: Hardware) -> tuple[int, str]:
    """Return the expert-parallel size with the shortest step among those that fit, and the reason with its gain.

    Args:
        layouts: the layout of each size.
    """
    fitting = {size: layout for size, layout in layouts.items() if memory.fits(layout)}
    if not fitting:  # the largest size needs the least memory
        most = max(layouts)
        return most, f"{experts} experts are sharded over {most} ranks, because fewer need more memory"
    tokens_per_s = {
        size: layout.tokens_per_step / step_time(memory.model, layout, hardware).total
        for size, layout in fitting.items()
    }
    best = max(tokens_per_s, key=lambda size: tokens_per_s[size])
    what = (
        f"every rank holds all {experts} experts" if best == 1 else f"{experts} experts are sharded over {best} ranks"
    )
    if len(fitting) == 1:
        return best, f"{what}, because fewer need more memory than available"
    other = max((size for size in tokens_per_s if size != best), key=lambda size: tokens_per_s[size])
    gain = tokens_per_s[best] / tokens_per_s[other] - 1
    slower = "without sharding" if other == 1 else f"sharding over {other} ranks"
    return best, f"{what}, {gain:.1%} faster than {slower}, by the planner's formulas for {hardware.name}"


def _zero_stages(wanted: str | int, engine: str) -> list[int]:
    """Return the allowed ZeRO stages, the preferred first."""
    if not isinstance(wanted, int):
        return [0] if engine == "local" else [1, 2, 3]
    if engine == "local" and wanted:
        raise ConfigError(f"--parallel.zero {wanted} needs DeepSpeed; use --parallel.engine deepspeed, or zero 0.")
    return [wanted]


def _micro_batches(config: RunConfig, world: int, most: int) -> list[int]:
    """Return the allowed micro-batch sizes, the preferred first.

    Args:
        most: the largest size in sequences, unless it is set; at least 1 is allowed.
    """
    batch, wanted = config.train.global_batch, config.train.micro_batch
    if batch % world:
        raise ConfigError(
            f"--train.global_batch {batch} is not a multiple of the world size {world}; "
            f"use {max(1, batch // world) * world} or {(batch // world + 1) * world}."
        )
    per_rank = batch // world
    valid = divisors(per_rank)
    if wanted is None:
        return [size for size in reversed(valid) if size <= max(1, most)]
    if wanted not in valid:
        raise ConfigError(
            f"--train.micro_batch {wanted} does not divide the {per_rank} sequences per rank and step ({world} ranks); "
            f"valid values: {', '.join(map(str, valid))}."
        )
    return [wanted]


def _explain_stage(layout: Layout, asked: bool, memory: Memory) -> str:
    lowest = ""
    if layout.engine == "local":
        why = "one process needs neither ZeRO nor a process group"
    elif asked:
        why = f"ZeRO {layout.zero} as set"
    else:
        why, lowest = f"ZeRO {layout.zero}", " is the lowest stage that fits"
    if memory.available is None:
        return f"{why}, the device's memory is unknown"
    warning = "" if memory.fits(layout) else f", the least possible, but more than {MEMORY_SHARE:.0%}"
    return f"{why}{lowest}, a rank needs {memory.need(layout) / 1e9:,.2g} of {memory.available / 1e9:,.2g} GB{warning}"
