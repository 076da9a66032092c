"""Sparse upcycling: a dense model's feed-forward layers as a mixture of experts (arXiv 2212.05055).

Every expert is a copy of the dense layer. A token's weights sum to 1, so the mixture computes what the dense layer did,
whatever the router selects. With granularity G a copy is split into G experts of 1/G of the width, whose down projections
are G times as large and whose router rows are equal: a token selects all experts of a copy or none, each with 1/G of the
copy's weight (virtual groups, arXiv 2410.07524, section 3.2).

Shape letters: H hidden, I width of the dense layer, W width of an expert.
"""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smolds_dist.errors import ConfigError
from smolds_dist.settings import Model

# Standard deviation of the router logits for hidden states with a root mean square of 1: small, so that the selected experts
# have nearly equal weights, and the balancer can change every selection from the first step on.
LOGITS = 0.1
CHANGED = ("num_experts", "num_experts_per_tok", "scoring_func")  # the settings of a dense model that change
OPTIONS = {
    "granularity": (1, "G", "experts per copy of a dense layer"),
    "noise": (0.0, "SHARE", "noise added to the experts' weights, as a share of their standard deviation"),
    "drop": (0.0, "SHARE", "share of each expert's columns to reinitialize, such as 0.5"),
}


@dataclass(frozen=True)
class Upcycling:
    """How experts are made from a dense layer."""

    granularity: int = 1  # experts per copy
    noise: float = 0.0  # added to every weight of an expert, as a share of the matrix's standard deviation
    drop: float = 0.0  # share of an expert's columns that are reinitialized (Drop-Upcycling, arXiv 2502.19261)
    seed: int = 0


def check_options(given: Any) -> None:
    """Raise a `ConfigError` for options that need `--upcycle` if it is missing."""
    for name, (unset, *_) in OPTIONS.items():
        if not given.upcycle and getattr(given, f"upcycle_{name}") != unset:
            raise ConfigError(f"--upcycle-{name} needs --upcycle; add it, or remove --upcycle-{name}.")


def upcycled_model(dense: Model, requested: Model, how: Upcycling) -> Model:
    """Return the mixture's settings: the dense model's, with `CHANGED` as requested and the settings that follow from them.

    Raises:
        ConfigError: if the model is not dense, or cannot be split into these experts.
    """
    if dense.num_experts != 1:
        raise ConfigError(
            f"--upcycle needs a dense model, but this one has {dense.num_experts} experts; import it without --upcycle."
        )
    if dense.intermediate_size % how.granularity:
        raise ConfigError(
            f"--upcycle-granularity {how.granularity} does not divide the width of the dense layers, "
            f"{dense.intermediate_size}; use a divisor."
        )
    for name in ("num_experts", "num_experts_per_tok"):
        if getattr(requested, name) % how.granularity:
            raise ConfigError(
                f"--model.{name} {getattr(requested, name)} is not a multiple of --upcycle-granularity {how.granularity}; "
                "use a multiple."
            )
    return replace(
        dense,
        **{name: getattr(requested, name) for name in CHANGED},
        norm_topk_prob=True,
        intermediate_size=dense.intermediate_size // how.granularity,
    )


def upcycled(tensors: Iterable[tuple[str, Tensor]], model: Model, how: Upcycling) -> Iterator[tuple[str, Tensor]]:
    """Yield the mixture's logical tensors from those of the dense model, which has one expert.

    Args:
        model: the mixture's settings from `upcycled_model`.
    """
    copies = model.num_experts // how.granularity
    # Each layer's router [experts, H] has the same row for all experts of a copy.
    for layer in range(model.num_hidden_layers + model.num_nextn_predict_layers):
        name = f"model.layers.{layer}.mlp.gate.weight"
        rows = torch.randn(copies, model.hidden_size, generator=_chance(name, how)) * LOGITS / model.hidden_size**0.5
        yield name, rows.repeat_interleave(how.granularity, 0)
    for name, tensor in tensors:
        if ".mlp.experts.0." in name:
            yield from _experts_of(name, tensor.float(), model, how)
        elif ".mlp.gate." not in name:  # the unused router of one expert, in smolds' format
            yield name, tensor


def _experts_of(name: str, tensor: Tensor, model: Model, how: Upcycling) -> Iterator[tuple[str, Tensor]]:
    """Yield one matrix for all experts: [W, H] of gate and up, [H, W] of down."""
    down = ".down_proj." in name
    slices = tensor.chunk(how.granularity, dim=1 if down else 0)
    for expert in range(model.num_experts):
        matrix = slices[expert % how.granularity].clone()
        if down:
            matrix *= how.granularity
        std = matrix.std()
        if how.drop:
            # The same columns in all three matrices of an expert; they depend only on layer and expert.
            expert_name = f"{name.partition('.experts.')[0]}.{expert}"
            redrawn = torch.rand(model.intermediate_size, generator=_chance(expert_name, how)) < how.drop
            drawn = torch.randn(matrix.shape, generator=_chance(f"drop {name} {expert}", how)) * std + matrix.mean()
            matrix = torch.where(redrawn if down else redrawn[:, None], drawn, matrix)
        if how.noise:
            matrix += torch.randn(matrix.shape, generator=_chance(f"noise {name} {expert}", how)) * std * how.noise
        yield name.replace(".experts.0.", f".experts.{expert}."), matrix


def _chance(name: str, how: Upcycling) -> torch.Generator:
    """Return the generator of a tensor, by its name, so that the order of a model's files does not matter."""
    return torch.Generator().manual_seed(how.seed << 32 | zlib.crc32(name.encode()))


def add_options(parser: Any) -> None:
    """Add the options of `smolds import`."""
    parser.add_argument(
        "--upcycle",
        action="store_true",
        help="turn a dense model into a mixture of --model.num_experts experts, --model.num_experts_per_tok per token",
    )
    for name, (default, metavar, text) in OPTIONS.items():
        parser.add_argument(f"--upcycle-{name}", type=type(default), default=default, metavar=metavar, help=text)
