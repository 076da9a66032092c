"""The two engines, one interface: `LocalEngine` is plain PyTorch for one process, `DeepSpeedEngine` is everything else.

A step is `forward` and `backward` for each of `topology.accumulation` micro batches, then `step`. Both engines give the
same losses. Their training state goes in and out as `Fragment`s, which know no engine and no layout.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from smolds_dist.parallel.fragments import Fragment

KindsOf = Callable[[str], Iterable[str]]
Fill = Callable[[Fragment], None]  # puts what belongs there into every kind of a fragment


class Update(NamedTuple):
    """What an optimizer step did."""

    grad_norm: float  # before clipping
    applied: bool  # no rank updates anything where the loss or the gradient of any rank is not finite
    squares: dict[str, Tensor]
    """This rank's share of the squared gradient norm, by the `part` of the parameter groups, up to a factor that all have in
    common: summed over ranks, the shares of a whole."""


def model_inputs(
    device: torch.device, ids: Tensor, labels: Tensor, positions: Tensor | None, num_labels: Tensor | None
) -> dict[str, Any]:
    """`Engine.forward`'s arguments as the model's."""
    given = {"input_ids": ids, "labels": labels, "position_ids": positions, "num_items_in_batch": num_labels}
    at_once = device.type == "cuda"  # pinned memory is copied without the host's waiting
    inputs = {name: value.to(device, non_blocking=at_once) for name, value in given.items() if value is not None}
    return {**inputs, "use_cache": False}


class Engine(Protocol):
    """What the training loop needs of an engine."""

    model: nn.Module  # for evaluation, sampling and the balancer; on all ranks together
    device: torch.device

    def forward(
        self, ids: Tensor, labels: Tensor, positions: Tensor | None = None, num_labels: Tensor | None = None
    ) -> Tensor:
        """Mean loss (fp32 scalar) of ids [B, S] on this rank's device; the graph is kept for `backward`.

        Args:
            positions: [B, S], where they are not those in the sequence.
            num_labels: what the sum of the losses is divided by, where it is not the number of labels here.
        """

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` / accumulation to the step's."""

    def step(self, lr: float, by_part: bool = False, factors: dict[str, Tensor] | None = None) -> Update:
        """Averages over ranks, clips, updates and clears the gradients.

        Args:
            by_part: whether to fill in `Update.squares`.
            factors: of the rows of logical tensors, by name, which these are multiplied by once they are updated.
        """

    def time_all_to_all(self, on: bool) -> None:
        """Starts or ends the timing of all-to-all, which keeps the device from running ahead."""

    def all_to_all_seconds(self) -> float:
        """Seconds this rank has spent in all-to-all, waiting for others included, since the last call of this."""

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Elementwise sum over all ranks."""

    def fragments(self) -> Iterator[Fragment]:
        """What this rank holds of weights and optimizer state, in an order that never changes. Not collective.

        The views are live: optimizer state that is written to them is what training goes on with.
        """

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all logical tensors of the model, those of other ranks' experts too."""

    @property
    def optimizer_steps(self) -> int:
        """Updates that the optimizer has made."""

    def allocate_optimizer_state(self, kinds_of: KindsOf, steps: int) -> None:
        """Makes room for the state of an optimizer that has made `steps` updates, so that `fragments` shows it.

        Args:
            kinds_of: names of the state of a logical tensor, "value" left out.
        """

    def barrier(self) -> None:
        """Waits for all ranks."""

    def close(self) -> None:
        """Lets go of the engine's memory; the process group stays."""


def squares_by_part(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Squared norm of the gradients that `optimizer` holds, fp32, by the `part` of its groups."""
    norms: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        if gradients:
            norms.setdefault(group["part"], []).append(nn.utils.get_total_norm(gradients))
    return {part: torch.stack(several).square().sum() for part, several in norms.items()}


@torch.no_grad()
def scale_rows(fragment: Fragment, factors_R: Tensor) -> None:
    """Multiplies what is held of a matrix [R, C] by a factor of each row."""
    value = fragment.tensors["value"]
    rows = torch.arange(fragment.start, fragment.start + len(value), device=value.device) // fragment.shape[1]
    value.mul_(factors_R.to(value.device)[rows])


def nan_unless_finite(loss: Tensor) -> Tensor:
    """1 for a finite loss, else NaN: as a factor, it makes the check of the gradient one of the loss too."""
    return torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def same_shape(state: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    """The entries of an optimizer's state that have a number for every element of the parameter."""
    return {k: t for k, t in state.items() if isinstance(t, Tensor) and t.shape == parameter.shape}


def allocate_state(optimizer: torch.optim.Optimizer, parameter: Tensor, kinds: Iterable[str], steps: int) -> None:
    """As torch's optimizers make their state: zeros, and a count of steps beside the parameter for fused kernels."""
    fused = optimizer.defaults.get("fused", False)
    count = torch.tensor(float(steps), device=parameter.device if fused else "cpu")
    optimizer.state[parameter] = {"step": count, **{kind: torch.zeros_like(parameter).detach() for kind in kinds}}


def optimizer_step_count(optimizer: torch.optim.Optimizer) -> int:
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
