"""Exponential moving averages of tensors that training updates in place: the optimizer's weights, and selection biases."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

EMA = "ema"  # kind of a logical tensor's average in fragments and checkpoints


class MovingAverage:
    """Keeps ema <- decay * ema + (1 - decay) * value for each tensor, on its device and in its dtype.

    An average starts from the tensor's value, so none is biased towards zero and nothing is corrected.

    Args:
        decay: of the average; 0 = off: no averages are kept, and every method does nothing.
        tensors: what is averaged, fp32.
    """

    def __init__(self, decay: float = 0.0, tensors: Iterable[Tensor] = ()):
        self._weight = 1 - decay
        self._averages = {id(tensor): tensor.detach().clone() for tensor in tensors} if decay else {}

    def of(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return a tensor's live average by its kind; empty if off."""
        return {EMA: self._averages[id(tensor)]} if self._averages else {}

    @torch.no_grad()
    def update(self, tensors: Sequence[Tensor]) -> None:
        """Add the current values to the averages of these tensors."""
        if self._averages and tensors:
            averages = [self._averages[id(tensor)] for tensor in tensors]
            torch._foreach_lerp_(averages, list(tensors), self._weight)
