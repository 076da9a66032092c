"""The topology of a run: device, backend, data x expert layout, ZeRO stage, dtype and micro batch, as pure functions.

`detect_machine` is the only place that looks at the hardware; `plan_topology` decides from what it is given.
"""

import math
import os
from dataclasses import dataclass

from smolds_dist.config import RunConfig
from smolds_dist.errors import ConfigError

# Tokens of one forward pass that keep the device busy without filling its memory with activations.
TOKENS_PER_PASS = {"cpu": 4096, "mps": 4096, "cuda": 16384}


@dataclass(frozen=True)
class Machine:
    """What this process can compute on."""

    devices: tuple[str, ...]  # kinds, best first; "cpu" is always the last
    device_count: int  # of the best kind; for the CPU, its cores
    bf16: bool  # whether the best kind multiplies bf16 natively


@dataclass(frozen=True)
class RankInfo:
    """This process among the ranks, as torchrun and deepspeed tell it."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


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

    @property
    def torch_device(self) -> str:
        return f"cuda:{self.local_rank}" if self.device == "cuda" else self.device

    @property
    def per_rank(self) -> int:
        """Sequences of one rank per step."""
        return self.micro_batch * self.accumulation

    def __str__(self) -> str:
        ranks = "1 process" if self.world_size == 1 else f"{self.world_size} ranks over {self.backend}"
        engine = "plain PyTorch" if self.engine == "local" else f"DeepSpeed ZeRO {self.zero}"
        return (
            f"{ranks} on {self.device}, {engine}, expert parallel size {self.expert}, {self.dtype}, "
            f"{self.world_size} x {self.accumulation} x {self.micro_batch} sequences per step"
        )


def detect_machine() -> Machine:
    """Reads the hardware through torch."""
    import torch

    if torch.cuda.is_available():
        return Machine(("cuda", "cpu"), torch.cuda.device_count(), torch.cuda.is_bf16_supported())
    if torch.backends.mps.is_available():
        return Machine(("mps", "cpu"), 1, False)
    return Machine(("cpu",), available_cores(), False)


def available_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rank_from_environment() -> RankInfo:
    """The rank that torchrun or deepspeed gave this process; a single one where neither started it.

    Raises:
        ConfigError: where RANK is set but its companions are not.
    """
    if "RANK" not in os.environ:
        return RankInfo()
    try:
        return RankInfo(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"RANK is set in the environment but {error} is missing or no number; start ranks with `smolds launch`, "
            "or unset RANK for a single process."
        ) from None


def plan_topology(config: RunConfig, machine: Machine, rank: RankInfo) -> Topology:
    """Fills in what the configuration leaves to "auto" and checks what it sets.

    Raises:
        ConfigError: where a setting cannot work at this world size or on this machine, with the values that can.
    """
    parallel, train, world = config.parallel, config.train, rank.world_size
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
    expert = _expert_size(config, world)
    zero = _zero_stage(config, engine)
    if train.balance == "aux_loss" and engine == "deepspeed":
        raise ConfigError(
            "--train.balance aux_loss needs the router's scores, which DeepSpeed's expert-parallel layer keeps to itself; "
            "use --train.balance bias, or one process with --parallel.engine local."
        )
    dtype = train.dtype
    if dtype == "auto":
        dtype = "bf16" if device == "cuda" and machine.bf16 else "fp32"
    micro_batch = _micro_batch(config, world, device)
    return Topology(
        rank=rank.rank,
        local_rank=rank.local_rank,
        world_size=world,
        device=device,
        backend=None if engine == "local" else "nccl" if device == "cuda" else "gloo",
        engine=engine,
        expert=expert,
        zero=zero,
        dtype=dtype,
        micro_batch=micro_batch,
        accumulation=train.global_batch // (world * micro_batch),
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


def _expert_size(config: RunConfig, world: int) -> int:
    experts, wanted = config.model.num_experts, config.parallel.expert
    valid = expert_sizes(world, experts)
    if wanted == "auto":
        return valid[-1]
    if wanted not in valid:
        raise ConfigError(
            f"--parallel.expert {wanted} must divide the world size ({world}) and the number of experts ({experts}); "
            f"valid values: {', '.join(map(str, valid))}."
        )
    return wanted


def _zero_stage(config: RunConfig, engine: str) -> int:
    wanted, muon = config.parallel.zero, config.train.optimizer == "muon"
    if wanted == "auto":
        return 0 if engine == "local" or muon else 1
    if engine == "local" and wanted:
        raise ConfigError(f"--parallel.zero {wanted} needs DeepSpeed; use --parallel.engine deepspeed, or zero 0.")
    if muon and wanted:
        raise ConfigError(
            f"--train.optimizer muon needs whole matrices, which ZeRO {wanted} cuts into pieces; "
            "use --parallel.zero 0, or --train.optimizer adamw."
        )
    return wanted


def _micro_batch(config: RunConfig, world: int, device: str) -> int:
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
        return max(size for size in valid if size <= most)
    if wanted not in valid:
        raise ConfigError(
            f"--train.micro_batch {wanted} does not divide the {per_rank} sequences that each of {world} ranks has per "
            f"step; valid values: {', '.join(map(str, valid))}."
        )
    return wanted
