"""A family of models: one configuration at other widths, depths and numbers of experts, as the rungs of a ladder."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from smolds_dist.architecture import divisors
from smolds_dist.costs.flops import matmul_weights
from smolds_dist.costs.memory import with_vocabulary
from smolds_dist.errors import ConfigError
from smolds_dist.rules import validate
from smolds_dist.settings import RunConfig

MULTIPLE = 8  # of scaled widths of experts and latents


@dataclass(frozen=True, order=True)
class Size:
    """A member of a family; as text 64x2, or 64x2x16 with its number of experts."""

    width: int  # of the residual stream in channels
    depth: int  # layers
    experts: int | None = None  # per layer; None: as the family; 1: dense, with the same active weights

    def __str__(self) -> str:
        return f"{self.width}x{self.depth}" + (f"x{self.experts}" if self.experts else "")


def parse_size(text: str, option: str) -> Size:
    """Return the size that `str(size)` wrote; raise a `ConfigError` that names `option` for another form."""
    if not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5}){1,2}", text):
        raise ConfigError(f"{option} {text!r} is not a size; write WIDTHxDEPTH, such as 64x2.")
    return Size(*map(int, text.split("x")))


def head_step(config: RunConfig) -> int:
    """Return the width per head, or per several if heads do not divide the family's width."""
    return config.model.hidden_size // math.gcd(config.model.hidden_size, config.model.num_attention_heads)


def sized(config: RunConfig, size: Size) -> RunConfig:
    """Return the family's settings for one size.

    Head sizes stay, so attention's scale does too. Numbers of heads, the widths of experts and dense layers and latent ranks
    are proportional to the width. A dense member (`experts` 1) has one expert as wide as all experts of a token together.

    Raises:
        ConfigError: for a width without whole heads, or settings that contradict each other at this size.
    """
    m = config.model
    step = head_step(config)
    if size.width % step:
        below = size.width // step * step
        nearest = " or ".join(str(width) for width in (below, below + step) if width)
        raise ConfigError(
            f"width {size.width} of {size} is not a whole number of heads, of which the family has one per {step} channels; "
            f"use {nearest}."
        )
    heads = m.num_attention_heads * size.width // m.hidden_size
    wanted = heads * m.num_key_value_heads / m.num_attention_heads

    def scaled(width: int) -> int:
        if size.width == m.hidden_size:
            return width
        return max(MULTIPLE, round(width * size.width / m.hidden_size / MULTIPLE) * MULTIPLE)

    latents: dict[str, Any] = {}
    if m.attention == "latent":
        latents = {"q_lora_rank": m.q_lora_rank and scaled(m.q_lora_rank), "kv_lora_rank": scaled(m.kv_lora_rank)}
    model = replace(
        m,
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=heads,
        num_key_value_heads=min(divisors(heads), key=lambda n: abs(n - wanted)),
        intermediate_size=scaled(m.intermediate_size),
        dense_intermediate_size=m.dense_intermediate_size and scaled(m.dense_intermediate_size),
        **latents,
    )
    if size.experts == 1:
        together = (m.num_experts_per_tok + m.n_shared_experts) * model.intermediate_size
        model = replace(
            model, num_experts=1, num_experts_per_tok=1, n_shared_experts=0, intermediate_size=together, n_group=None,
            topk_group=None, norm_topk_prob=True, routed_scaling_factor=1.0,
        )  # fmt: skip
    elif size.experts:
        model = replace(model, num_experts=size.experts)
    found = replace(config, model=model)
    try:
        validate(found)
    except ConfigError as error:
        raise ConfigError(f"size {size}: {error}") from None
    return found


def weights(config: RunConfig) -> tuple[int, int]:
    """Return the matmul weights that a token uses, head included, and all of them, with every expert counted. Blocks of
    multi-token prediction do not count: the loss that a law predicts is not theirs."""
    model = replace(with_vocabulary(config), num_nextn_predict_layers=0)
    outside, experts = matmul_weights(model)
    return outside + experts, outside + experts // model.num_experts_per_tok * model.num_experts


def granularity(config: RunConfig) -> float:
    """Return the width of a dense layer with a token's feed-forward weights over that of one expert (arXiv 2402.07871,
    section 3.1)."""
    return float(config.model.num_experts_per_tok + config.model.n_shared_experts)
