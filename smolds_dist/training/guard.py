"""Handle non-finite steps and loss spikes."""

from collections import deque
from collections.abc import Iterable
from statistics import median

from smolds_dist.errors import TrainingStoppedError
from smolds_dist.settings import Train

WINDOW = 100  # recent losses that a spike is compared with
MIN_STEPS = 20  # minimum number of them
MAX_ROLLBACKS = 3


class LossSpikeError(Exception):
    """The loss was far above its previous values from step `begin` to step `end`: roll back and skip these samples."""

    def __init__(self, begin: int, end: int):
        super().__init__(f"the loss spiked from step {begin} to {end}")
        self.begin, self.end = begin, end


class LossGuard:
    """Checks every step's loss, which is the same on all ranks, so that all make the same decision.

    Args:
        history: losses of the steps before the first checked one.
    """

    def __init__(self, train: Train, history: Iterable[float] = ()):
        self.train = train
        self._recent = deque(history, maxlen=WINDOW)
        self._skipped = 0  # in a row
        self._spikes = 0  # in a row

    def check(self, step: int, loss: float, applied: bool) -> None:
        """Check a step.

        Args:
            applied: False if the optimizer skipped its update because of a non-finite value.

        Raises:
            TrainingStoppedError: after `train.nonfinite_limit` steps in a row without an update.
            LossSpikeError: after `train.spike_steps` spikes in a row.
        """
        if not applied:
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
