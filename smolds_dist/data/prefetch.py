"""Ahead: a rank's part of the next batch is assembled in a thread, while the model is busy with the one before."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from torch import Tensor

from smolds_dist.data.batch import TrainingData, batch_digest
from smolds_dist.progress import StoppedWaitingError

POLL_SECONDS = 0.2
STOP_GRACE_SECONDS = 3.0  # of waiting once a stop is asked for: text that comes on one rank comes on all by then


class BatchPrefetcher:
    """Batches in the order of the run.

    Args:
        stride: from a batch's first sample to that of the next one, which is the global batch.
        pinned: into memory that a GPU copies from without the host's waiting.
    """

    def __init__(self, data: TrainingData, stride: int, pinned: bool = False):
        self._data, self._stride, self._pinned = data, stride, pinned
        self._pool = ThreadPoolExecutor(1, "batches")
        self._taken = range(0)
        self._next: tuple[range, Future | None] = range(0), None

    def take(self, indices: range, should_stop: Callable[[], bool] = lambda: False) -> tuple[Tensor, int]:
        """Token ids [len(indices), seq_len] at those places of the run, and their digest.

        Args:
            stopped: whether the run was asked to stop, which ends a longer wait.

        Raises:
            StoppedWaitingError: then.
        """
        self._taken = indices
        ahead, future = self._next
        if ahead != indices or future is None:
            future = self._pool.submit(self._assemble, indices)
            self._next = indices, future
        asked = 0
        while not wait([future], timeout=POLL_SECONDS).done:
            asked += should_stop()
            if asked * POLL_SECONDS > STOP_GRACE_SECONDS:
                raise StoppedWaitingError
        return future.result()

    def prefetch_next(self) -> None:
        """Begins on the batch after the one last taken, if that is not under way.

        To be called just before the host has long to wait: Python runs one thread at a time, and this one comes first.
        """
        following = range(self._taken.start + self._stride, self._taken.stop + self._stride)
        if self._next[0] != following:
            self._next = following, self._pool.submit(self._assemble, following)

    def _assemble(self, indices: range) -> tuple[Tensor, int]:
        # Of the whole batch, so that what is wrong with the text is wrong on all ranks in the same step.
        self._data.wait_for_samples((indices.start // self._stride + 1) * self._stride)
        ids = self._data.batch(indices)
        return (ids.pin_memory() if self._pinned else ids), batch_digest(ids, indices)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
