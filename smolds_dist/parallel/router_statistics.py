"""Router confidence: the entropy and distribution of the probabilities.

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
    """Accumulates statistics of every layer's router probabilities in the forward passes inside `recording()`.

    Scores that do not sum to 1 (sigmoid) are first divided by their sum.
    """

    def __init__(self, model: nn.Module):
        layers = moe_layers(model)
        device = next(iter(layers.values())).tokens_per_expert.device
        # Per layer: tokens, the sum of their entropies, and the number of probabilities in each bin.
        self._sums = torch.zeros(len(layers), 2 + BINS, device=device)
        self._on = False
        for number, layer in enumerate(layers.values()):
            router = getattr(layer, "router", None)
            if router is None:
                gate, scoring = layer.gate, layer.gate.config.scoring_func
            else:  # AutoEP does not return the scores, but a hook can read the Linear's logits
                gate, scoring = router.gate, router.score_func
            gate.register_forward_hook(partial(self._record, number, scoring))

    @contextmanager
    def recording(self, on: bool = True) -> Iterator[None]:
        """Wrap a training forward pass, like `Balancer.counting`."""
        self._on = on
        yield
        self._on = False

    @torch.no_grad()
    def _record(self, layer: int, scoring: str, _module: Any, _inputs: Any, output: Any) -> None:
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
        """Return and reset this rank's sums, [L, 2 + BINS]; see `entropy_and_histogram`."""
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        return sums


def entropy_and_histogram(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return, from `take`'s sums over all ranks, the mean entropy of a token's probabilities in nats [L] (at most ln E) and
    the number of probabilities in each bin [L, BINS]."""
    return sums[:, 1] / sums[:, 0], sums[:, 2:]
