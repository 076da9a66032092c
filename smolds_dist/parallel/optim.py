"""Optimizers and learning-rate schedules: AdamW, or Muon for hidden matrices and AdamW for the rest."""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from smolds_dist.parallel.fragments import full_shape, logical_shapes
from smolds_dist.parallel.matrix_owners import apply_by_shape
from smolds_dist.parallel.mup import MuP
from smolds_dist.settings import Train

MUON_MOMENTUM = 0.95
BATCH_ELEMENTS = 2**25
"""Elements that Muon updates at a time: if ranks share the work, with one collective."""
PARTS = ("embeddings", "attention", "dense_layers", "routers", "experts", "shared_experts", "norms")  # of a model


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], train: Train, mup: MuP | None = None
) -> list[dict]:
    """Group parameters for `make_optimizer` by part of the model: norms have no weight decay, some matrices use Muon.

    A group's `part` is the name its gradient norm is reported under; `matrices` is the number of matrices stacked along
    each parameter's rows, for Muon. `rate` is the ratio of the learning rate to the run's; `mup` splits groups by it. Weight
    decay, which a step multiplies by the learning rate, does not depend on it.
    """
    muon = train.optimizer == "muon"
    groups: dict[str, dict] = {
        name: {
            "name": name, "part": name.partition("/")[0], "params": [], "matrices": matrices, "rate": 1.0,
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
        group = groups[kind]
        if mup:
            tensor, shape = next(iter(logical_shapes(name, full_shape(parameter)).items()))
            rate = mup.rate(tensor, shape, group["muon"])
            scaled = {"name": f"{kind} x {rate:.6g}", "rate": rate, "weight_decay": group["weight_decay"] / rate}
            group = groups.setdefault(scaled["name"], group | scaled | {"params": []})
        group["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def make_optimizer(groups: list[dict], train: Train, dtype: str = "fp32") -> torch.optim.Optimizer:
    """Make the run's optimizer over `parameter_groups`. The learning rate is 0 until the engine sets each step's.

    Args:
        dtype: of the run, fp32 or bf16.
    """
    betas = (train.beta1, train.beta2)
    # PyTorch's fused kernel is several times faster than its loop, on CPU and CUDA.
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
    if train.optimizer == "muon":
        return MuonAdamW(groups, 0.0, betas, fused, torch.bfloat16 if dtype == "bf16" else torch.float32)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=fused)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for groups with `muon`, AdamW for the others, with one learning rate for both.

    Muon steps along the orthogonalized momentum, scaled by 0.2 sqrt(max(rows, columns)) to match the size of AdamW's
    updates (arXiv 2502.16982, equation 4). Stacked experts [E, rows, columns] count as E matrices.

    A group's `on_matrices` lets ranks share the work on several parameters. It takes the parameters, a tensor of values for
    each, and a function of matrices [N, rows, columns], and replaces the values by the function's result. The values have
    the shape of such matrices, or are flat if ZeRO has sharded the parameters.

    Args:
        fused: use PyTorch's fused kernel for AdamW.
        dtype: of the orthogonalization's matmuls.
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        betas: tuple[float, float],
        fused: bool = True,
        dtype: torch.dtype = torch.float32,
    ):
        defaults = dict(lr=lr, betas=betas, eps=1e-8, weight_decay=0.0, muon=False, matrices=1, fused=fused)
        super().__init__(groups, defaults)
        self._update = partial(muon_update, dtype=dtype)

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None, "no closure: the engine computes the gradients"
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not group["muon"]:
                self._adamw(parameters, group)
                continue
            for some in in_batches(parameters):
                updates = self._muon(some, group)
                torch._foreach_mul_(some, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(some, updates, alpha=-group["lr"])

    def _muon(self, parameters: list[Any], group: dict) -> list[Tensor]:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - MUON_MOMENTUM)
        values = list(torch._foreach_lerp(gradients, momenta, MUON_MOMENTUM))  # Nesterov's
        for i, parameter in enumerate(parameters):
            if parameter.ndim > 1:
                rows, columns = parameter.shape[-2:]
                values[i] = values[i].view(-1, rows // group["matrices"], columns)
        if "on_matrices" in group:
            group["on_matrices"](parameters, values, self._update)
        else:
            apply_by_shape(((matrix.shape, matrix) for stack in values for matrix in stack), self._update)
        return [value.view(p.shape) for p, value in zip(parameters, values, strict=True)]

    def _adamw(self, parameters: list[Any], group: dict) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                allocate_state(self, parameter, ("exp_avg", "exp_avg_sq"), 0)
        kinds = ("exp_avg", "exp_avg_sq", "step")
        means, squares, steps = ([self.state[parameter][kind] for parameter in parameters] for kind in kinds)
        gradients, (beta1, beta2) = [parameter.grad for parameter in parameters], group["betas"]
        adamw(
            parameters, gradients, means, squares, [], steps, fused=group["fused"], amsgrad=False, maximize=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip


def allocate_state(optimizer: torch.optim.Optimizer, parameter: Tensor, kinds: Iterable[str], steps: int) -> None:
    """Allocate state as torch's optimizers do: zeros, and a step count (on the parameter's device for fused kernels)."""
    fused = optimizer.defaults.get("fused", False)
    count = torch.tensor(float(steps), device=parameter.device if fused else "cpu")
    optimizer.state[parameter] = {"step": count, **{kind: torch.zeros_like(parameter).detach() for kind in kinds}}


def in_batches(parameters: list[Any]) -> Iterator[list[Any]]:
    """Yield parameters of about `BATCH_ELEMENTS` elements at a time."""
    some: list[Any] = []
    for parameter in parameters:
        some.append(parameter)
        if sum(p.numel() for p in some) >= BATCH_ELEMENTS:
            yield some
            some = []
    if some:
        yield some


def muon_update(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Orthogonalize the momentum [..., rows, columns] and scale it to the size of AdamW's updates."""
    return orthogonalize(matrices, dtype=dtype) * (0.2 * math.sqrt(max(matrices.shape[-2:])))


def orthogonalize(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Approximate the closest semi-orthogonal matrix of each [..., rows, columns]; singular values end in about 0.7 to 1.2.

    Newton-Schulz iteration with the quintic coefficients of Jordan et al., "Muon" (2024).

    Args:
        dtype: of the matmuls; the iteration corrects its own rounding, so bf16 suffices.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
