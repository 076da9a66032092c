"""Router confidence: the entropy and distribution of the probabilities.

Shape letters: T tokens, L layers, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

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
        layers = list(moe_layers(model).values())
        # Per layer: tokens, the sum of their entropies, and the number of probabilities in each bin.
        self._sums = torch.zeros(len(layers), 2 + BINS, device=layers[0].tokens_per_expert.device)
        self._on = self._captured = False
        self._logits: dict[int, Tensor] = {}  # of the pass, by layer
        for number, layer in enumerate(layers):
            if router := getattr(
                layer, "router", None
            ):  # AutoEP does not return the scores, but a hook can read the logits
                self._scoring = router.score_func
                router.gate.register_forward_hook(lambda *args, number=number: self._keep(number, args[-1]))
            else:
                self._scoring = layer.config.scoring_func
                layer.observe = partial(self._keep, number)

    def _keep(self, layer: int, logits_TE: Tensor) -> None:
        if self._on and self._captured:
            with torch.no_grad():
                self._logits.setdefault(layer, torch.empty_like(logits_TE)).copy_(logits_TE)
        elif self._on:
            self._logits[layer] = logits_TE.detach()

    @contextmanager
    def recording(self, on: bool = True) -> Iterator[None]:
        """Wrap a training forward pass, like `Balancer.counting`."""
        self._on = on
        yield
        self._on = False
        for layer in sorted(self._logits) if on else ():  # one at a time: all would take much memory beside activations
            self._add(self._sums[layer], self._logits[layer])
        if not self._captured:
            self._logits.clear()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Wrap the capture of forward passes, whose replays all write the logits to the same memory."""
        self._on = self._captured = True
        try:
            yield
        except Exception:
            self._captured = False
            self._logits.clear()
            raise
        finally:
            self._on = False

    @torch.no_grad()
    def _add(self, sums: Tensor, logits_TE: Tensor) -> None:
        scores_TE = router_scores(logits_TE, self._scoring).float()
        share_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        sums[0] += len(share_TE)
        sums[1] += torch.special.entr(share_TE).sum()
        sums[2:] += torch.histc(share_TE, BINS, 0, 1)  # ignores NaN

    def take(self) -> Tensor:
        """Return and reset this rank's sums, [L, 2 + BINS]; see `entropy_and_histogram`."""
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        return sums


def entropy_and_histogram(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return, from `take`'s sums over all ranks, the mean entropy of a token's probabilities in nats [L] (at most ln E) and
    the number of probabilities in each bin [L, BINS]."""
    return sums[:, 1] / sums[:, 0], sums[:, 2:]
