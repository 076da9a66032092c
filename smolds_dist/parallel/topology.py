"""The topology of a run: device, backend, data x expert layout, ZeRO stage, dtype and micro batch, as pure functions.

Ranks of a node have consecutive numbers, and DeepSpeed's expert groups are consecutive ranks: a group lies inside a node
exactly where its size divides the ranks per node.

`detect_machine` is the only place that looks at the hardware; `plan_topology` decides from what it is given.
"""

import math
import os
from dataclasses import dataclass

from smolds_dist.costs.hardware import Hardware, known_hardware, load_hardware
from smolds_dist.costs.layout import Layout, configured
from smolds_dist.costs.memory import MEMORY_SHARE, PROCESS_BYTES, rank_memory, with_vocabulary
from smolds_dist.costs.step_time import step_time
from smolds_dist.errors import ConfigError
from smolds_dist.parallel.ranks import RankInfo
from smolds_dist.settings import RunConfig

# Tokens of one forward pass that keep the device busy without filling its memory with activations.
TOKENS_PER_PASS = {"cpu": 4096, "mps": 4096, "cuda": 16384}


@dataclass(frozen=True)
class Machine:
    """What this process can compute on."""

    devices: tuple[str, ...]  # kinds, best first; "cpu" is always the last
    device_count: int  # of the best kind; for the CPU, its cores
    bf16: bool  # whether the best kind multiplies bf16 as fast as fp32, or faster
    memory: int | None = None  # bytes of one device of the best kind; for the CPU, of the whole machine
    name: str | None = None  # of the best kind, as PyTorch has it; of the CPU "cpu"


@dataclass(frozen=True)
class Topology:
    """The validated layout of a run; every rank has the same but for `rank` and `local_rank`."""

    rank: int
    local_rank: int
    world_size: int
    device: str  # cpu, cuda or mps
    backend: str | None  # nccl, gloo, or None for a single process without a process group
    engine: str  # local or deepspeed
    expert: int  # ranks that share one set of experts
    zero: int
    dtype: str  # fp32 or bf16
    micro_batch: int  # sequences per forward pass of one rank
    accumulation: int  # forward passes per step of one rank
    nodes: int = 1
    keeps_memory: bool = True  # on a CPU, what a step has freed stays with the process
    reason: str = ""  # one sentence on why the layout is what it is

    @property
    def torch_device(self) -> str:
        return f"cuda:{self.local_rank}" if self.device == "cuda" else self.device

    @property
    def per_rank(self) -> int:
        """Sequences of one rank per step."""
        return self.micro_batch * self.accumulation

    def __str__(self) -> str:
        nodes = f" on {self.nodes} nodes," if self.nodes > 1 else ""
        ranks = "1 process" if self.world_size == 1 else f"{self.world_size} ranks over {self.backend}"
        engine = "plain PyTorch" if self.engine == "local" else f"DeepSpeed ZeRO {self.zero}"
        return (
            f"{ranks}{nodes} on {self.device}, {engine}, expert parallel size {self.expert}, {self.dtype}, "
            f"{self.world_size} x {self.accumulation} x {self.micro_batch} sequences per step"
        )


def detect_machine() -> Machine:
    """Reads the hardware through torch."""
    import torch

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        name = torch.cuda.get_device_name(0)
        return Machine(("cuda", "cpu"), torch.cuda.device_count(), torch.cuda.is_bf16_supported(), memory, name)
    if torch.backends.mps.is_available():
        return Machine(("mps", "cpu"), 1, False, torch.mps.recommended_max_memory())
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return Machine(("cpu",), available_cores(), cpu_multiplies_bf16(), installed, "cpu")


def cpu_multiplies_bf16() -> bool:
    """Whether PyTorch has more than a plain loop for bf16 products on this CPU: on x86 from AVX-512 on. Measured with AVX2,
    such a product took 20 times as long as in fp32."""
    import torch

    return torch.backends.cpu.get_cpu_capability() not in ("AVX2", "NO AVX")


def available_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plan_topology(config: RunConfig, machine: Machine, rank: RankInfo) -> Topology:
    """Fills in what the configuration leaves to "auto" and checks what it sets.

    Raises:
        ConfigError: where a setting cannot work at this world size or on this machine, with the values that can.
    """
    parallel, train, world = config.parallel, config.train, rank.world_size
    if parallel.hardware is not None:
        load_hardware(parallel.hardware)  # a mistake shows at once, not where it begins to matter
    device = machine.devices[0] if parallel.device == "auto" else parallel.device
    if device not in machine.devices:
        raise ConfigError(f"--parallel.device {device} is not on this machine; use {' or '.join(machine.devices)}.")
    if device == "cuda" and rank.local_rank >= machine.device_count:
        raise ConfigError(
            f"local rank {rank.local_rank} has no GPU of its own, this node has {machine.device_count}; start fewer ranks."
        )
    if device == "mps" and world > 1:
        raise ConfigError("Apple's GPU takes one process; start one, or use --parallel.device cpu.")

    engine = _engine(config, world)
    dtype = train.dtype
    if dtype == "auto":
        dtype = "bf16" if device == "cuda" and machine.bf16 else "fp32"
    sizes, why_expert = _expert_sizes(config, world, rank.ranks_per_node)
    memory = machine.memory if device == machine.devices[0] else None
    if memory is not None and device == "cpu":
        memory = memory // rank.ranks_per_node
    stages = _zero_stages(config, engine)
    batches = _micro_batches(config, world, device)
    settings = configured(config)
    layouts = {
        size: [
            Layout(
                world, rank.ranks_per_node, size, zero, batch, train.global_batch // (world * batch), config.data.seq_len,
                dtype, device, engine, **settings,
            )
            for batch in batches
            for zero in stages
        ]
        for size in sizes
    }  # fmt: skip
    expert = sizes[-1]
    if len(sizes) > 1:
        hardware = hardware_of(config, machine, device)
        if hardware is None:
            unknown = "figures of this machine are not known, which smolds plan --calibrate measures"
            why_expert = f"{why_expert}, and {unknown}"
        else:
            firsts = {size: _first_that_fits(config, layouts[size], memory)[0] for size in sizes}
            expert, why_expert = _fastest(config, firsts, hardware.shared_by(rank.ranks_per_node), memory)
    layout, why_layout, fits = _first_that_fits(config, layouts[expert], memory)
    keeps_memory = fits if parallel.keep_memory == "auto" else parallel.keep_memory
    if device == "cpu" and not keeps_memory:
        why_layout += "; what a step frees goes back to the system, which takes time"
    if device == "cpu" == machine.devices[0] and dtype == "bf16" and not machine.bf16:
        why_layout += (
            "; fp32 would be many times as fast, because this CPU has no bf16 products: leave --train.dtype out"
        )
    return Topology(
        rank=rank.rank,
        local_rank=rank.local_rank,
        world_size=world,
        device=device,
        backend=None if engine == "local" else "nccl" if device == "cuda" else "gloo",
        engine=engine,
        expert=expert,
        zero=layout.zero,
        dtype=dtype,
        micro_batch=layout.micro_batch,
        accumulation=layout.accumulation,
        nodes=-(-world // rank.ranks_per_node),
        keeps_memory=keeps_memory,
        reason=f"{why_expert}; {why_layout}." if world > 1 else f"{why_layout}.",
    )


def expert_sizes(world_size: int, num_experts: int) -> list[int]:
    """Expert-parallel sizes that divide both the ranks and the experts."""
    common = math.gcd(world_size, num_experts)
    return [size for size in range(1, common + 1) if common % size == 0]


def _engine(config: RunConfig, world: int) -> str:
    parallel = config.parallel
    if parallel.engine == "local" and world > 1:
        raise ConfigError(f"--parallel.engine local is for one process, here are {world} ranks; use deepspeed or auto.")
    if parallel.engine != "auto":
        return parallel.engine
    wants_deepspeed = parallel.zero not in ("auto", 0) or parallel.ds_config is not None
    return "deepspeed" if world > 1 or wants_deepspeed else "local"


def _expert_sizes(config: RunConfig, world: int, per_node: int) -> tuple[list[int], str]:
    """The expert-parallel sizes that may be taken, the largest last, and why it would be that one: groups stay inside a node
    unless somebody asks for more."""
    experts, wanted = config.model.num_experts, config.parallel.expert
    valid = expert_sizes(world, experts)
    inside = [size for size in valid if per_node % size == 0]
    if not isinstance(wanted, int):
        sizes = inside if wanted == "auto" else inside[-1:]
        if inside[-1] == 1:
            return sizes, f"every rank holds all {experts} experts, because no larger group fits evenly into a node"
        where = f" inside a node of {per_node}" if per_node < world else ""
        return sizes, f"{experts} experts are shared by {inside[-1]} ranks{where}, the most that divide evenly"
    if wanted not in valid:
        raise ConfigError(
            f"--parallel.expert {wanted} must divide the world size ({world}) and the number of experts ({experts}); "
            f"valid values: {', '.join(map(str, valid))}."
        )
    where = "" if wanted in inside else f", across nodes of {per_node}, whose links are slower"
    return [wanted], f"{experts} experts are shared by {wanted} ranks as asked{where}"


def hardware_of(config: RunConfig, machine: Machine, device: str) -> Hardware | None:
    """What the planner's formulas take for a machine, if there are figures."""
    if config.parallel.hardware is not None:
        return load_hardware(config.parallel.hardware)
    if machine.name is None:
        return None
    return known_hardware("cpu" if device == "cpu" else machine.name)


def _fastest(config: RunConfig, layouts: dict[int, Layout], hardware: Hardware, memory: int | None) -> tuple[int, str]:
    """The expert-parallel size with the shortest step among those that fit, and by how much it is.

    Args:
        layouts: of each size, the one that it would have.
        memory: bytes of a device.
    """
    model, experts = with_vocabulary(config), config.model.num_experts
    process = PROCESS_BYTES[next(iter(layouts.values())).device]
    fitting = {
        size: layout
        for size, layout in layouts.items()
        if memory is None or rank_memory(model, layout, process).total <= MEMORY_SHARE * memory
    }
    if not fitting:  # the one that needs least is the one that shares most
        most = max(layouts)
        return most, f"{experts} experts are shared by {most} ranks, because fewer need more memory"
    tokens_per_s = {
        size: layout.tokens_per_step / step_time(model, layout, hardware).total for size, layout in fitting.items()
    }
    best = max(tokens_per_s, key=lambda size: tokens_per_s[size])
    what = f"every rank holds all {experts} experts" if best == 1 else f"{experts} experts are shared by {best} ranks"
    if len(fitting) == 1:
        return best, f"{what}, because fewer ranks that share them need more memory than there is"
    other = max((size for size in tokens_per_s if size != best), key=lambda size: tokens_per_s[size])
    gain = tokens_per_s[best] / tokens_per_s[other] - 1
    shared = "none are shared" if other == 1 else f"{other} ranks share them"
    return best, f"{what}, {gain:.1%} faster than where {shared}, by the planner's formulas for {hardware.name}"


def _zero_stages(config: RunConfig, engine: str) -> list[int]:
    """The ZeRO stages that may be taken, the preferred first."""
    wanted = config.parallel.zero
    if wanted == "auto":
        return [0] if engine == "local" else [1, 2, 3]
    if engine == "local" and wanted:
        raise ConfigError(f"--parallel.zero {wanted} needs DeepSpeed; use --parallel.engine deepspeed, or zero 0.")
    return [wanted]


def _micro_batches(config: RunConfig, world: int, device: str) -> list[int]:
    """The micro batches that may be taken, the preferred first."""
    batch, wanted = config.train.global_batch, config.train.micro_batch
    if batch % world:
        raise ConfigError(
            f"--train.global_batch {batch} is not a multiple of the world size {world}; "
            f"use {max(1, batch // world) * world} or {(batch // world + 1) * world}."
        )
    per_rank = batch // world
    valid = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
    if wanted is None:
        most = max(1, TOKENS_PER_PASS[device] // config.data.seq_len)
        return [size for size in reversed(valid) if size <= most]
    if wanted not in valid:
        raise ConfigError(
            f"--train.micro_batch {wanted} does not divide the {per_rank} sequences that each of {world} ranks has per "
            f"step; valid values: {', '.join(map(str, valid))}."
        )
    return [wanted]


def _first_that_fits(config: RunConfig, layouts: list[Layout], memory: int | None) -> tuple[Layout, str, bool]:
    """The first layout that fits into a device's memory, by `costs.memory`, else the one that needs least; why; and whether
    it fits, as far as is known."""
    if memory is None:
        why = _why_stage(config, layouts[0]).removesuffix(" is the lowest stage that fits")
        return layouts[0], f"{why}, the device's memory is unknown", True
    model, process = with_vocabulary(config), PROCESS_BYTES[layouts[0].device]
    needs = [rank_memory(model, layout, process).total for layout in layouts]
    place = next((i for i, need in enumerate(needs) if need <= MEMORY_SHARE * memory), None)
    warning, fits = "", place is not None
    if place is None:
        place = needs.index(min(needs))
        warning = f", which is the least there is, yet more than {MEMORY_SHARE:.0%}"
    amount = f"a rank needs {needs[place] / 1e9:,.2g} of {memory / 1e9:,.2g} GB{warning}"
    return layouts[place], f"{_why_stage(config, layouts[place])}, {amount}", fits


def _why_stage(config: RunConfig, layout: Layout) -> str:
    if layout.engine == "local":
        return "one process needs neither ZeRO nor a process group"
    if config.parallel.zero != "auto":
        return f"ZeRO {layout.zero} as asked"
    return f"ZeRO {layout.zero} is the lowest stage that fits"
