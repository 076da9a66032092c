"""The layout of a step, on which memory and time depend in addition to the model: ranks, and the work of each."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolds_dist.errors import ConfigError
from smolds_dist.inputs import read_json

DEEPSPEED_BUCKET = 500_000_000  # DeepSpeed's default `reduce_bucket_size`


@dataclass(frozen=True)
class Layout:
    """One way to run a training step.

    The fields from `tensor` on describe published runs that the planner is compared with; smolds uses their defaults.
    """

    world: int
    per_node: int  # ranks per node
    expert: int  # expert-parallel size
    zero: int
    micro_batch: int  # sequences per forward pass and rank
    accumulation: int  # forward passes per step
    seq_len: int
    dtype: str  # fp32 or bf16; published runs: also fp8
    device: str = "cuda"
    engine: str = "deepspeed"
    recompute: str = "none"  # in the backward pass: none, attention, experts, selective or full
    optimizer: str = "adamw"
    ema: bool = False  # moving averages of the weights
    graphs: bool = False  # CUDA graphs, where they are possible
    offload: bool = False  # optimizer state in host memory
    copies: bool = False  # checkpoint data is copied to host memory and written in the background
    bucket: int | None = None  # elements per DeepSpeed gradient bucket; None: "auto"
    gradient_bytes: int = 0  # per element in reductions; 0: as the weights, or fp32 at ZeRO 0
    tensor: int = 1
    pipeline: int = 1
    interleave: int = 1  # virtual pipeline stages per rank
    once_per_node: bool = False  # a row is sent to a node once, for any number of its experts there (DeepEP)
    most_nodes: int = 0  # router's limit on nodes per token; 0: none
    hides_all_to_all: bool = False  # behind another micro batch's compute (DualPipe)

    @property
    def tokens(self) -> int:
        """Tokens per forward pass and rank."""
        return self.micro_batch * self.seq_len

    @property
    def replicas(self) -> int:
        """Data-parallel ranks."""
        return self.world // (self.tensor * self.pipeline)

    @property
    def tokens_per_step(self) -> int:
        """Tokens per step over all ranks."""
        return self.replicas * self.accumulation * self.tokens

    @property
    def captured(self) -> bool:
        """True if micro batches run as CUDA graphs, which keep the memory of activations."""
        return self.graphs and (self.device, self.engine, self.dtype) == ("cuda", "local", "bf16")

    @property
    def element_bytes(self) -> int:
        """Bytes per weight or activation."""
        return {"fp32": 4, "bf16": 2, "fp8": 2}[self.dtype]  # fp8 training keeps bf16 activations and weights


def load_stretch(max_vio: float, num_experts: int, expert: int) -> float:
    """Return the relative excess of the most loaded rank's expert load over the mean.

    With one expert per rank it equals MaxVio. Several average out: the mean of n experts drawn out of E without replacement
    deviates by sqrt((E - n) / (n (E - 1))) of one expert's deviation; 0 with all experts on a rank.
    """
    own = num_experts // expert
    return max_vio * math.sqrt((num_experts - own) / (own * (num_experts - 1))) if num_experts > 1 else 0.0


def most_received(top_k: int, num_experts: int, expert: int) -> float:
    """Return the most rows that a rank's experts can get, over the mean: every token selects them with as many of its K
    slots as they have experts."""
    return expert * min(1.0, num_experts // expert / top_k)


def layout_of(config: Any, topology: Any) -> Layout:
    """Return the layout of a `RunConfig` and its `Topology`."""
    return Layout(
        world=topology.world_size,
        per_node=-(-topology.world_size // topology.nodes),
        expert=topology.expert,
        zero=topology.zero,
        micro_batch=topology.micro_batch,
        accumulation=topology.accumulation,
        seq_len=config.data.seq_len,
        dtype=topology.dtype,
        device=topology.device,
        engine=topology.engine,
        **configured(config),
    )


def configured(config: Any) -> dict[str, Any]:
    """Return the `Layout` fields that a `RunConfig` and its DeepSpeed file, if any, set for every topology."""
    fields = {
        "recompute": config.train.activation_checkpointing,
        "optimizer": config.train.optimizer,
        "ema": bool(config.train.ema),
        "graphs": config.train.cuda_graphs is not False and not config.data.document_mask,
        "copies": bool(config.checkpoint.every and config.checkpoint.background),
    }
    if config.parallel.ds_config is None:
        return fields
    try:
        read = read_json(Path(config.parallel.ds_config), "fix it", dict[str, Any])
        zero = read.get("zero_optimization", {})
        bucket = zero.get("reduce_bucket_size", DEEPSPEED_BUCKET)
        return fields | {
            "offload": zero.get("offload_optimizer", {}).get("device", "none") != "none",
            "bucket": None if bucket == "auto" else int(bucket),
        }
    except (AttributeError, TypeError, ValueError, ConfigError):
        return fields  # training reports the file's error
