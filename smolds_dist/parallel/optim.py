"""Optimizers and learning-rate schedules: AdamW, or Muon for hidden matrices and AdamW for the rest."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from smolds_dist.parallel.fragments import full_shape
from smolds_dist.settings import Train

MUON_MOMENTUM = 0.95
BATCH_ELEMENTS = 2**25
"""Elements updated at a time when ranks share the work: one collective for all of them."""
PARTS = ("embeddings", "attention", "dense_layers", "routers", "experts", "shared_experts", "norms")  # of a model


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], train: Train) -> list[dict]:
    """Group parameters for `make_optimizer` by part of the model: norms have no weight decay, some matrices use Muon.

    A group's `part` is the name its gradient norm is reported under; `matrices` is the number of matrices stacked along
    each parameter's rows, for Muon.
    """
    muon = train.optimizer == "muon"
    groups: dict[str, dict] = {
        name: {
            "name": name, "part": name.partition("/")[0], "params": [], "matrices": matrices,
            "weight_decay": 0.0 if name == "norms" else train.weight_decay, "muon": takes_muon,
        }
        for name, takes_muon, matrices in (
            # Muon is for maps between hidden states; embeddings and routers map from or to discrete indices.
            ("embeddings", False, 1),
            ("attention", muon, 1),
            ("dense_layers", muon, 1),
            ("routers", False, 1),
            ("experts/gate_up", muon, 2),
            ("experts", muon, 1),
            ("shared_experts", muon, 1),
            ("norms", False, 1),
        )
    }  # fmt: skip
    for name, parameter in named_parameters:
        if len(full_shape(parameter)) < 2:
            kind = "norms"
        elif "embed_tokens" in name or "lm_head" in name:
            kind = "embeddings"
        elif "shared_experts" in name:
            kind = "shared_experts"
        elif ".gate." in name or ".router." in name:
            kind = "routers"
        elif ".experts." in name:
            kind = "experts/gate_up" if name.endswith("gate_up_proj") else "experts"
        elif ".mlp." in name:
            kind = "dense_layers"
        else:
            kind = "attention"
        groups[kind]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def make_optimizer(groups: list[dict], train: Train) -> torch.optim.Optimizer:
    """Make the run's optimizer over `parameter_groups`. The learning rate is 0 until the engine sets each step's."""
    betas = (train.beta1, train.beta2)
    if train.optimizer == "muon":
        return MuonAdamW(groups, lr=0.0, betas=betas)
    # PyTorch's fused kernel is several times faster than its loop, on CPU and CUDA.
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=fused)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for groups with `muon`, AdamW for the others, with one learning rate for both.

    Muon steps along the orthogonalized momentum, scaled by 0.2 sqrt(max(rows, columns)) to match the size of AdamW's
    updates (arXiv 2502.16982, equation 4). Stacked experts [E, rows, columns] count as E matrices.

    A group's `on_matrices` lets ranks share the work on several parameters. It takes the parameters, a tensor of values for
    each, and a function of matrices [N, rows, columns], and replaces the values by the function's result. The values have
    the shape of such matrices, or are flat if ZeRO has sharded the parameters.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float = 1e-8):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0, muon=False, matrices=1))

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None, "no closure: the engine computes the gradients"
        for group in self.param_groups:
            for some in in_batches(group):
                if group["muon"]:
                    updates = self._muon(some, group)
                else:
                    updates = [self._adam(p, p.grad, self.state[p], group) for p in some]
                for parameter, update in zip(some, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _muon(self, parameters: list[Any], group: dict) -> list[Tensor]:
        values = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].lerp_(parameter.grad, 1 - MUON_MOMENTUM)
            nesterov = parameter.grad.lerp(momentum, MUON_MOMENTUM)
            if parameter.ndim > 1:
                rows, columns = parameter.shape[-2:]
                nesterov = nesterov.view(-1, rows // group["matrices"], columns)
            values.append(nesterov)
        if "on_matrices" in group:
            group["on_matrices"](parameters, values, muon_update)
        else:
            values = [muon_update(matrices) for matrices in values]
        return [value.reshape(p.shape) for p, value in zip(parameters, values, strict=True)]

    @staticmethod
    def _adam(parameter: Tensor, gradient: Tensor, state: dict, group: dict) -> Tensor:
        beta1, beta2 = group["betas"]
        if not state:
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            state |= {"step": torch.tensor(0.0), **zeros}
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        step = state["step"].add_(1).item()
        mean.lerp_(gradient, 1 - beta1)
        square.lerp_(gradient.square(), 1 - beta2)
        root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        return mean / (1 - beta1**step) / root


def in_batches(group: dict) -> Iterator[list[Any]]:
    """Yield a group's parameters with gradients: singly, or about `BATCH_ELEMENTS` elements if ranks share the work."""
    some: list[Any] = []
    for parameter in group["params"]:
        if parameter.grad is not None:
            some.append(parameter)
            if "on_matrices" not in group or sum(p.numel() for p in some) >= BATCH_ELEMENTS:
                yield some
                some = []
    if some:
        yield some


def muon_update(matrices: Tensor) -> Tensor:
    """Orthogonalize the momentum [..., rows, columns] and scale it to the size of AdamW's updates."""
    return orthogonalize(matrices) * (0.2 * math.sqrt(max(matrices.shape[-2:])))


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximate the closest semi-orthogonal matrix of each [..., rows, columns]; singular values end in about 0.7 to 1.2.

    Newton-Schulz iteration with the quintic coefficients of Jordan et al., "Muon" (2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def learning_rate(step: int, train: Train) -> float:
    """Return the learning rate of step 1, 2, ..., `train.steps`: linear warmup, then cosine, or stable and linear decay.

    The latter is WSD (arXiv 2404.06395, section 4.2). Both end at `lr * min_lr_fraction`.
    """
    warmup = min(train.warmup_steps, train.steps)
    if step <= warmup:
        return train.lr * step / warmup
    if train.schedule == "cosine":
        done = (step - warmup) / max(1, train.steps - warmup)
        share = 0.5 * (1 + math.cos(math.pi * done))
    else:
        decay_steps = min(round(train.steps * train.decay_fraction), train.steps - warmup)
        share = min(1.0, (train.steps - step) / decay_steps) if decay_steps else 1.0
    return train.lr * (train.min_lr_fraction + (1 - train.min_lr_fraction) * share)
