"""Auxiliary-loss-free load balancing (arXiv 2408.15664): a selection bias per expert, updated once per optimizer step.

Shape letters: L layers, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smolds_dist.parallel.moving_average import MovingAverage


def moe_layers(model: nn.Module) -> dict[str, Any]:
    """Return the MoE layers by name: our `DeepSeekMoE`, or DeepSpeed's AutoEP layer that replaces it."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "tokens_per_expert")}


class Balancer:
    """Counts a step's routed tokens per expert over all ranks and micro batches and updates the biases to even them out.

    A layer is any module with `tokens_per_expert` [E]: our `DeepSeekMoE` (router `gate`) or DeepSpeed's AutoEP layer
    (router `router`). Both count in every forward pass, so only passes inside `counting()` are used.

    Args:
        rate: change of a bias per step; 0 = count only.
        ema: decay of the biases' moving averages; 0 = none.
    """

    def __init__(self, model: nn.Module, rate: float, ema: float = 0.0):
        self.rate = rate
        named = moe_layers(model)
        self.layers, self._names = list(named.values()), list(named)
        routers = [getattr(layer, "router", None) or layer.gate for layer in self.layers]
        self.biases: list[Tensor] = [router.e_score_correction_bias for router in routers]
        self._average = MovingAverage(ema, self.biases)
        device = self.layers[0].tokens_per_expert.device
        self._counts = torch.zeros(len(self.layers), len(self.biases[0]), device=device)
        # One tensor of all layers' buffers. An engine may have cast them to bf16, where counts above 256 are inexact.
        self._of_pass = torch.zeros_like(self._counts)
        for layer, counts_E in zip(self.layers, self._of_pass, strict=True):
            layer.tokens_per_expert = counts_E

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Wrap a training forward pass. Evaluation, sampling and recomputation in backward must stay outside."""
        self._of_pass.zero_()
        yield
        self._counts += self._of_pass

    def take(self) -> Tensor:
        """Return and reset the step's routed tokens per expert over all ranks, [L, E] on the device. Collective."""
        counts_LE, self._counts = self._counts, torch.zeros_like(self._counts)
        if dist.is_initialized():
            dist.all_reduce(counts_LE)
        return counts_LE

    @torch.no_grad()
    def step(self, applied: bool = True, rate_scale: float = 1.0, counts_LE: Tensor | None = None) -> Tensor:
        """End the optimizer step: b += rate * sign(mean load - load), then center b on zero (algorithm 1). Does not wait for
        the device.

        Args:
            applied: False for a skipped optimizer update, which leaves the biases unchanged too.
            rate_scale: factor of the rate in this step.
            counts_LE: the step's routed tokens; default: those of `take`.

        Returns:
            `counts_LE`.
        """
        if counts_LE is None:
            counts_LE = self.take()
        if self.rate and applied:
            bias_LE = torch.stack(self.biases)
            bias_LE += self.rate * rate_scale * torch.sign(counts_LE.mean(-1, keepdim=True) - counts_LE)
            # Only differences between biases affect routing; centered, they cannot drift and lose precision.
            bias_LE -= bias_LE.mean(-1, keepdim=True)
            torch._foreach_copy_(self.biases, list(bias_LE.unbind()))
        if applied:
            self._average.update(self.biases)
        return counts_LE

    def named_biases(self) -> dict[str, Tensor]:
        """Return the selection biases [E] as live tensors, under the single-process model's names."""
        named = zip(self._names, self.biases, strict=True)
        return {f"{name}.gate.e_score_correction_bias": bias for name, bias in named}

    def state(self) -> dict[tuple[str, str], Tensor]:
        """Return what checkpoints store, as live tensors [E] by name and kind: biases ("value"), and averages ("ema")."""
        named = self.named_biases().items()
        return {
            (name, kind): t for name, bias in named for kind, t in ({"value": bias} | self._average.of(bias)).items()
        }


def max_violation(counts_LE: Tensor) -> Tensor:
    """Compute MaxVio per layer, [L]: the busiest expert's tokens over the mean, minus 1 (arXiv 2408.15664, eq. 4)."""
    return counts_LE.max(-1).values / counts_LE.mean(-1).clamp(min=1e-9) - 1
