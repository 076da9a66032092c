"""A dense model's feed-forward layers as a mixture of experts (sparse upcycling, arXiv 2212.05055).

Every expert is a copy of the dense layer. A token's weights add up to 1, so that the mixture computes what the dense layer
did, whatever its router says. With granularity G a copy is cut into G experts of 1/G of the width each, whose down
projections are G times as large and whose router's rows are the same: a token chooses all experts of a copy or none, each
with 1/G of the copy's weight (virtual groups, arXiv 2410.07524, section 3.2).

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

# Standard deviation of the routers' logits, of hidden states with a root mean square of 1: small, so that the experts that
# are chosen have nearly equal weights, and the balancer can move every choice from the first step on.
LOGITS = 0.1
CHANGED = ("num_experts", "num_experts_per_tok", "scoring_func")  # what of a dense model's settings becomes another
OPTIONS = {
    "granularity": (1, "G", "cut each copy of a dense layer into G experts"),
    "noise": (0.0, "SHARE", "add noise to the experts' weights, as a share of their standard deviation"),
    "drop": (0.0, "SHARE", "draw this share of each expert's columns anew, such as 0.5"),
}


@dataclass(frozen=True)
class Upcycling:
    """How experts come out of a dense layer."""

    granularity: int = 1  # experts that a copy is cut into
    noise: float = 0.0  # added to every weight of an expert, as a share of the matrix's standard deviation
    drop: float = 0.0  # share of an expert's columns that are drawn anew (Drop-Upcycling, arXiv 2502.19261)
    seed: int = 0


def check_options(given: Any) -> None:
    """Refuses what only `--upcycle` listens to without it."""
    for name, (unset, *_) in OPTIONS.items():
        if not given.upcycle and getattr(given, f"upcycle_{name}") != unset:
            raise ConfigError(f"--upcycle-{name} needs --upcycle; add it, or leave --upcycle-{name} out.")


def upcycled_model(dense: Model, wanted: Model, how: Upcycling) -> Model:
    """The mixture's settings: those of the dense model, but for `CHANGED`, which are as wanted, and what follows from them.

    Raises:
        ConfigError: where the model is no dense one, or the experts cannot be made of it.
    """
    if dense.num_experts != 1:
        raise ConfigError(
            f"--upcycle makes experts of a dense model, this one has {dense.num_experts} already; import it without."
        )
    if dense.intermediate_size % how.granularity:
        raise ConfigError(
            f"--upcycle-granularity {how.granularity} does not cut the dense layers, {dense.intermediate_size} wide, into "
            "experts of one width; use a divisor."
        )
    for name in ("num_experts", "num_experts_per_tok"):
        if getattr(wanted, name) % how.granularity:
            raise ConfigError(
                f"--model.{name} {getattr(wanted, name)} is no multiple of --upcycle-granularity {how.granularity}, which a "
                "token's experts have to come in; raise it to one."
            )
    return replace(
        dense,
        **{name: getattr(wanted, name) for name in CHANGED},
        norm_topk_prob=True,
        intermediate_size=dense.intermediate_size // how.granularity,
    )


def upcycled(tensors: Iterable[tuple[str, Tensor]], model: Model, how: Upcycling) -> Iterator[tuple[str, Tensor]]:
    """The mixture's logical tensors out of those of the dense model, which has one expert.

    Args:
        model: the mixture's settings, `upcycled_model`.
    """
    copies = model.num_experts // how.granularity
    for layer in range(model.num_hidden_layers):  # its router [experts, H], the same row for all experts of a copy
        name = f"model.layers.{layer}.mlp.gate.weight"
        rows = torch.randn(copies, model.hidden_size, generator=_chance(name, how)) * LOGITS / model.hidden_size**0.5
        yield name, rows.repeat_interleave(how.granularity, 0)
    for name, tensor in tensors:
        if ".mlp.experts.0." in name:
            yield from _experts_of(name, tensor.float(), model, how)
        else:
            yield name, tensor


def _experts_of(name: str, tensor: Tensor, model: Model, how: Upcycling) -> Iterator[tuple[str, Tensor]]:
    """One matrix of all experts: [W, H] of gate and up, [H, W] of down."""
    down = ".down_proj." in name
    parts = tensor.chunk(how.granularity, dim=1 if down else 0)
    for expert in range(model.num_experts):
        part = parts[expert % how.granularity].clone()
        if down:
            part *= how.granularity
        std = part.std()
        if how.drop:
            # The same columns of all three matrices of an expert: which they are depends on the layer and the expert alone.
            place = f"{name.partition('.experts.')[0]}.{expert}"
            redrawn = torch.rand(model.intermediate_size, generator=_chance(place, how)) < how.drop
            drawn = torch.randn(part.shape, generator=_chance(f"drop {name} {expert}", how)) * std + part.mean()
            part = torch.where(redrawn if down else redrawn[:, None], drawn, part)
        if how.noise:
            part += torch.randn(part.shape, generator=_chance(f"noise {name} {expert}", how)) * std * how.noise
        yield name.replace(".experts.0.", f".experts.{expert}."), part


def _chance(name: str, how: Upcycling) -> torch.Generator:
    """Of a tensor by its name, so that the order of a model's files makes no difference."""
    return torch.Generator().manual_seed(how.seed << 32 | zlib.crc32(name.encode()))


def add_options(parser: Any) -> None:
    """Adds the options of `smolds import`."""
    parser.add_argument(
        "--upcycle",
        action="store_true",
        help="make a mixture of experts of a dense model; --model.num_experts and --model.num_experts_per_tok say which",
    )
    for name, (default, metavar, text) in OPTIONS.items():
        parser.add_argument(f"--upcycle-{name}", type=type(default), default=default, metavar=metavar, help=text)
