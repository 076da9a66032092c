"""Routing that is even whatever the router says, for measuring speed without learned routing.

Shape letters: T tokens, K experts per token, E experts.
"""

from typing import Any

import torch
from torch import Tensor, nn

from smolds_dist.parallel.balancer import moe_layers


def force_uniform_routing(model: nn.Module) -> None:
    """From now on token t goes to the experts t K to t K + K - 1, counted on from the last to the first.

    Routers still compute all they would, and their weights stay those of the experts that they had chosen.
    """
    for layer in moe_layers(model).values():
        router = getattr(layer, "router", None)
        if router is None:
            layer.gate.register_forward_hook(_ours)
        else:
            router.register_forward_hook(_of_autoep)


def _ours(router: Any, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    weights, chosen, logits = output
    return weights, _turns(chosen, router.config.num_experts), logits


def _of_autoep(router: Any, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    weights, chosen, counts = output
    chosen = _turns(chosen, router.num_experts)
    return weights, chosen, torch.bincount(chosen.flatten(), minlength=router.num_experts).to(counts.dtype)


def _turns(chosen_TK: Tensor, num_experts: int) -> Tensor:
    return torch.arange(chosen_TK.numel(), device=chosen_TK.device).view_as(chosen_TK) % num_experts
