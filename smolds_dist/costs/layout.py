"""What memory and time depend on besides the model: how many ranks there are, and what each does in a step."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolds_dist.errors import ConfigError
from smolds_dist.inputs import read_json

DEEPSPEED_BUCKET = 500_000_000  # `reduce_bucket_size` where a file does not set it


@dataclass(frozen=True)
class Layout:
    """One way to run a training step.

    The fields from `tensor` on describe published runs that the planner is checked against; smolds has none of these, and
    leaves them as they are.
    """

    world: int
    per_node: int  # ranks of a node
    expert: int  # ranks that share one set of experts
    zero: int
    micro_batch: int  # sequences of a forward pass of one rank
    accumulation: int  # forward passes of a step
    seq_len: int
    dtype: str  # fp32 or bf16; of published runs also fp8
    device: str = "cuda"
    engine: str = "deepspeed"
    recompute: str = "none"  # in the backward pass: none, attention, experts, selective or full
    optimizer: str = "adamw"
    offload: bool = False  # the optimizer's state in the host's memory
    copies: bool = False  # to host memory of what a checkpoint holds, which is written from there in the background
    bucket: int | None = None  # numbers of one of DeepSpeed's buffers for gradients; None: what "auto" stands for
    gradient_bytes: int = 0  # of a number as ranks add them up; 0: as wide as the weights
    tensor: int = 1
    pipeline: int = 1
    interleave: int = 1  # virtual pipeline stages of a rank
    once_per_node: bool = False  # a row travels to a node once, however many of its experts are there (DeepEP)
    most_nodes: int = 0  # that a row's experts are on, where the router limits it; 0: any number
    hides_all_to_all: bool = False  # behind another micro batch's products (DualPipe)

    @property
    def tokens(self) -> int:
        """Of one forward pass of a rank."""
        return self.micro_batch * self.seq_len

    @property
    def replicas(self) -> int:
        """Ranks that see different tokens."""
        return self.world // (self.tensor * self.pipeline)

    @property
    def tokens_per_step(self) -> int:
        """Of all ranks."""
        return self.replicas * self.accumulation * self.tokens

    @property
    def element_bytes(self) -> int:
        """Of a weight or an activation."""
        return {"fp32": 4, "bf16": 2, "fp8": 2}[self.dtype]  # fp8 training keeps bf16 activations and weights


def load_stretch(max_vio: float, num_experts: int, expert: int) -> float:
    """How much longer than the mean the fullest rank's experts take, as a share.

    With one expert on a rank it is MaxVio itself. Several even each other out: the mean of n drawn out of E without
    replacement deviates by sqrt((E - n) / (n (E - 1))) of what one does; with all experts on a rank, nothing is left.
    """
    own = num_experts // expert
    return max_vio * math.sqrt((num_experts - own) / (own * (num_experts - 1))) if num_experts > 1 else 0.0


def layout_of(config: Any, topology: Any) -> Layout:
    """Of a `RunConfig` and its `Topology`."""
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
    """The fields of a `Layout` that a `RunConfig` sets whatever the topology, and the DeepSpeed file of its own, if any."""
    fields = {
        "recompute": config.train.activation_checkpointing,
        "optimizer": config.train.optimizer,
        "copies": bool(config.checkpoint.every and config.checkpoint.background),
    }
    if config.parallel.ds_config is None:
        return fields
    try:
        read = read_json(Path(config.parallel.ds_config), "mend it", dict[str, Any])
        zero = read.get("zero_optimization", {})
        bucket = zero.get("reduce_bucket_size", DEEPSPEED_BUCKET)
        return fields | {
            "offload": zero.get("offload_optimizer", {}).get("device", "none") != "none",
            "bucket": None if bucket == "auto" else int(bucket),
        }
    except (AttributeError, TypeError, ValueError, ConfigError):
        return fields  # the training says what is wrong with the file
