"""Uniform routing regardless of the router's scores, for measuring speed without learned routing.

Shape letters: T tokens, K experts per token, E experts.
"""

from typing import Any

import torch
from torch import Tensor, nn

from smolds_dist.parallel.balancer import moe_layers


def force_uniform_routing(model: nn.Module) -> None:
    """Route token t to the experts t K to t K + K - 1, modulo E, from now on.

    Routers still compute their scores; the routing weights stay those of the experts they had selected.
    """
    for layer in moe_layers(model).values():
        (getattr(layer, "router", None) or layer.gate).register_forward_hook(_round_robin)


def _round_robin(router: Any, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    weights, chosen_TK, last = output  # the logits of our own router, the counts of AutoEP's
    ours = hasattr(router, "config")
    experts = router.config.num_experts if ours else router.num_experts
    chosen_TK = torch.arange(chosen_TK.numel(), device=chosen_TK.device).view_as(chosen_TK) % experts
    if not ours:
        last = torch.bincount(chosen_TK.flatten(), minlength=experts).to(last.dtype)
    return weights, chosen_TK, last
