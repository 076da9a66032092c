"""How sure the routers are: their probabilities' entropy and distribution.

Shape letters: T tokens, L layers, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smolds_dist.model.moe import router_scores
from smolds_dist.parallel.balancer import moe_layers

BINS = 20  # of equal width, for probabilities from 0 to 1


class RouterStatistics:
    """Adds up, for every layer, what its router gives to the tokens of the forward passes inside `watching()`.

    Scores that do not sum to 1 (sigmoid) are divided by their sum first.
    """

    def __init__(self, model: nn.Module):
        layers = moe_layers(model)
        device = next(iter(layers.values())).tokens_per_expert.device
        # For every layer: tokens, the sum of their entropies, and how many probabilities fell into each bin.
        self._sums = torch.zeros(len(layers), 2 + BINS, device=device)
        self._on = False
        for number, layer in enumerate(layers.values()):
            router = getattr(layer, "router", None)
            if router is None:
                gate, scoring = layer.gate, layer.gate.config.scoring_func
            else:  # AutoEP keeps the scores to itself, but not the Linear that they come from
                gate, scoring = router.gate, router.score_func
            gate.register_forward_hook(partial(self._hook, number, scoring))

    @contextmanager
    def watching(self, on: bool = True) -> Iterator[None]:
        """Around a training forward pass; as `Balancer.counting`."""
        self._on = on
        yield
        self._on = False

    @torch.no_grad()
    def _hook(self, layer: int, scoring: str, _module: Any, _inputs: Any, output: Any) -> None:
        if not self._on:
            return
        logits_TE = output[2] if isinstance(output, tuple) else output
        scores_TE = router_scores(logits_TE, scoring).float()
        share_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        sums = self._sums[layer]
        sums[0] += len(share_TE)
        sums[1] += torch.special.entr(share_TE).sum()
        sums[2:] += torch.histc(share_TE, BINS, 0, 1)

    def take(self) -> Tensor:
        """This rank's sums since the last call, [L, 2 + BINS]; see `entropy_and_histogram`."""
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        return sums


def entropy_and_histogram(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Of what `take` gave, summed over ranks: mean entropy of a token's probabilities in nats [L] (at most ln E), and how
    many probabilities lie in each bin [L, BINS]."""
    return sums[:, 1] / sums[:, 0], sums[:, 2:]
