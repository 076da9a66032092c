"""The engines' interface: `LocalEngine` is plain PyTorch in one process, `DeepSpeedEngine` is everything else.

A step is `forward` and `backward` for each of `topology.accumulation` micro batches, then `step`. Both engines compute the
same losses. Training state is read and written as `Fragment`s, independent of engine and layout.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from smolds_dist.parallel.fragments import Fragment
from smolds_dist.parallel.topology import Topology

KindsOf = Callable[[str], Iterable[str]]
Fill = Callable[[Fragment], None]  # writes the values of every kind of a fragment
Factors = Callable[
    [dict[str, Tensor]], dict[str, Tensor]
]  # from `Update.read` to row factors by name of a logical tensor
Accept = Callable[[float, dict[str, Tensor]], bool]  # from a finite gradient norm and `Update.read`


NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class Update(NamedTuple):
    """The result of an optimizer step."""

    grad_norm: float  # before clipping
    applied: bool  # False on all ranks if any rank's loss or gradient is not finite, or if rejected
    squares: dict[str, Tensor]
    """This rank's squared gradient norm by the parameter groups' `part`, up to a common factor, on the host; sum it over
    ranks."""
    read: dict[str, Tensor]
    """The step's other results on the host, in fp32."""
    outlier: bool = False  # True on all ranks if `accept` rejected the update


def model_inputs(
    device: torch.device,
    ids: Tensor,
    labels: Tensor,
    positions: Tensor | None = None,
    bounds: Tensor | None = None,
    num_labels: Tensor | None = None,
) -> dict[str, Any]:
    """Convert `Engine.forward`'s arguments to the model's."""
    given = {"input_ids": ids, "labels": labels, "position_ids": positions, "cu_seq_lens_q": bounds}
    given["num_items_in_batch"] = num_labels
    inputs = {name: to_device(value, device) for name, value in given.items() if value is not None}
    return {**inputs, "use_cache": False}


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Copy to CUDA through pinned memory, from which alone a copy does not wait for the device."""
    if device.type != "cuda":
        return value.to(device)
    if value.device.type == "cpu" and not value.is_pinned():
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


class Watch(Protocol):
    """Measures an update; an engine may make it in several parts."""

    def before_update(self, fragments: Sequence[Fragment]) -> None:
        """Called with the slices to be updated: "value", and the clipped gradient as "gradient"."""

    def after_update(self) -> None:
        """Called when these slices are updated."""


class Engine(Protocol):
    """The interface that the training loop uses."""

    model: nn.Module  # for evaluation, sampling and the balancer; call on all ranks together
    device: torch.device

    def forward(
        self,
        ids: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        bounds: Tensor | None = None,
        num_labels: Tensor | None = None,
    ) -> Tensor:
        """Compute the mean loss (fp32 scalar) of ids [B, S] on this rank's device, with its graph.

        Args:
            positions: position ids [B, S]; default: the positions in the sequence.
            bounds: of the documents that `positions` separates (`model.causal_attention.Documents.bounds`); default: the
                model looks them up.
            num_labels: divisor of the summed losses; default: the number of labels in this batch.
        """

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` / accumulation to the step's."""

    def step(
        self,
        lr: float,
        by_part: bool = False,
        results: Mapping[str, Tensor] = NOTHING,
        factors: Factors | None = None,
        accept: Accept | None = None,
        watch: Watch | None = None,
    ) -> Update:
        """Average the gradients over ranks, clip, update the weights and clear the gradients.

        A skipped update, because of a value that is not finite or one that `accept` rejects, leaves weights and optimizer
        state unchanged.

        Args:
            by_part: whether to fill in `Update.squares`.
            results: other results of the step on the device, for `Update.read`: all leave it in one copy, for which alone
                `LocalEngine` waits.
            factors: returns row factors to apply after the update.
            accept: returns False to skip the update; one rank's answer decides for all.
            watch: called around the update, if it is not skipped.
        """

    def set_accumulation(self, topology: Topology) -> None:
        """Take micro batches as a stage's `topology` has them, from the next step on."""

    def without_graphs(self) -> AbstractContextManager[None]:
        """Run the passes of a step without recorded graphs, so that hooks are called."""

    def time_all_to_all(self, on: bool) -> None:
        """Start or stop timing all-to-alls, which synchronizes the device."""

    def all_to_all_seconds(self) -> float:
        """Return this rank's seconds in all-to-alls, including waits for other ranks, since the last call."""

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum elementwise over all ranks."""

    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's slices of weights and optimizer state, in a fixed order. Not collective.

        The views are live: training continues with what is written to them.
        """

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the model's logical tensors, including other ranks' experts."""

    @property
    def optimizer_steps(self) -> int:
        """Number of optimizer updates so far."""

    def allocate_optimizer_state(self, kinds_of: KindsOf, steps: int) -> None:
        """Allocate the state of an optimizer that has made `steps` updates, so that `fragments` includes it.

        Args:
            kinds_of: returns the names of a logical tensor's state, without "value".
        """

    def barrier(self) -> None:
        """Wait for all ranks."""

    def close(self) -> None:
        """Free the engine's memory; the process group stays."""


def squares_by_part(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the squared norm (fp32) of `optimizer`'s gradients by the `part` of its groups."""
    norms: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        if gradients:
            norms.setdefault(group["part"], []).append(nn.utils.get_total_norm(gradients))
    return {part: torch.stack(several).square().sum() for part, several in norms.items()}


@torch.no_grad()
def scale_rows(fragment: Fragment, factors_R: Tensor) -> None:
    """Multiply the local slice of a matrix [R, C] by one factor per row."""
    value = fragment.tensors["value"]
    rows = torch.arange(fragment.start, fragment.start + len(value), device=value.device) // fragment.shape[1]
    value.mul_(factors_R.to(value.device)[rows])


def read_together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors of any shape from one device to the host, as fp32, in one copy and thus one wait for the device."""
    if not tensors:
        return []
    flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def nan_unless_finite(loss: Tensor) -> Tensor:
    """Return 1 for a finite loss, else NaN; as a factor of the loss, it makes the gradient check cover the loss too."""
    return torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def same_shape(state: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    """Return the entries of an optimizer's state with the parameter's shape."""
    return {k: t for k, t in state.items() if isinstance(t, Tensor) and t.shape == parameter.shape}


def optimizer_step_count(optimizer: torch.optim.Optimizer) -> int:
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
