"""Handle non-finite steps, outliers and loss spikes."""

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

import numpy as np
import torch
from torch import Tensor

from smolds_dist.errors import TrainingStoppedError
from smolds_dist.settings import Train

WINDOW = 100  # recent losses that a spike is compared with
MIN_STEPS = 20  # minimum number of them
MAX_ROLLBACKS = 3
OUTLIER_WINDOW = 128  # recent steps that a loss and gradient norm are compared with
MIN_OUTLIER_STEPS = 64  # minimum number of them


class LossSpikeError(Exception):
    """The loss was far above its previous values from step `begin` to step `end`: roll back and skip these samples."""

    def __init__(self, begin: int, end: int):
        super().__init__(f"the loss spiked from step {begin} to {end}")
        self.begin, self.end = begin, end


class OutlierFilter:
    """Rejects the update of a step whose loss or gradient norm is far above those of the last `OUTLIER_WINDOW` steps.

    The rule of OLMo-core's SkipStepOptimizer (OLMo 2, arXiv 2501.00656), for values above the mean only. Rejected values
    are in the window as well: they raise its deviation, so after a lasting change updates resume by themselves.

    Args:
        limit: in standard deviations; 0 = off.
        state: of the filter of a checkpoint.
    """

    def __init__(self, limit: float = 0.0, state: dict[str, Tensor] | None = None):
        self.limit = limit
        self.count = int(state["count"]) if state else 0
        self._recent = deque[list[float]](state["recent"].tolist() if state else (), maxlen=OUTLIER_WINDOW)

    def accepts(self, norm: float, read: dict[str, Tensor]) -> bool:
        """Return True if a step's gradient norm and its loss over all ranks, `mean_loss` on the host, are usual."""
        if len(self._recent) < MIN_OUTLIER_STEPS:
            return True
        recent = np.array(self._recent)
        limits = recent.mean(0) + self.limit * recent.std(0, ddof=1)
        return read["mean_loss"].item() <= limits[0] and norm <= limits[1]

    def add(self, loss: float, norm: float, rejected: bool = False) -> None:
        """Add a step; values that are not finite do not enter the window."""
        if math.isfinite(loss) and math.isfinite(norm):
            self._recent.append([loss, norm])
        self.count += rejected

    def state(self) -> dict[str, Tensor]:
        """Return what checkpoints store, so that a resumed run decides as an uninterrupted one; empty if off."""
        if not self.limit:
            return {}
        recent = torch.tensor(list(self._recent), dtype=torch.float64).view(-1, 2)
        return {"recent": recent, "count": torch.tensor([self.count])}


class LossGuard:
    """Checks every step's loss, which is the same on all ranks, so that all make the same decision.

    Args:
        history: losses of the steps before the first checked one, in the same stage of the run.
    """

    def __init__(self, train: Train, history: Iterable[float] = ()):
        self.train = train
        self._recent = deque(history, maxlen=WINDOW)
        self._skipped = 0  # in a row
        self._spikes = 0  # in a row

    def check(self, step: int, loss: float, finite: bool) -> None:
        """Check a step.

        Args:
            finite: False if the optimizer skipped its update because of a non-finite value.

        Raises:
            TrainingStoppedError: after `train.nonfinite_limit` steps in a row without an update.
            LossSpikeError: after `train.spike_steps` spikes in a row.
        """
        if not finite:
            self._skipped += 1
            if self._skipped >= self.train.nonfinite_limit:
                raise TrainingStoppedError(
                    f"loss or gradient was NaN or infinite in {self._skipped} steps in a row, up to step {step}; "
                    "lower --train.lr or set --train.grad_clip, and continue from the last checkpoint"
                )
            return
        self._skipped = 0
        if self.train.spike_threshold and self._is_spike(loss):
            self._spikes += 1
            if self._spikes >= self.train.spike_steps:
                raise LossSpikeError(step - self._spikes + 1, step)
            return
        self._spikes = 0
        self._recent.append(loss)

    def _is_spike(self, loss: float) -> bool:
        """Return True if the loss is far above the median, in median absolute deviations, both robust to spikes."""
        if len(self._recent) < MIN_STEPS:
            return False
        middle = median(self._recent)
        # 1.4826 makes it the standard deviation of a normal distribution.
        deviation = 1.4826 * median(abs(value - middle) for value in self._recent)
        return loss > middle + self.train.spike_threshold * max(deviation, 1e-3 * middle)
