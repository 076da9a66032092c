"""Prefetch: a thread assembles a rank's slice of the next batch while the model trains on the current one."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from torch import Tensor

from smolds_dist.data.batch import Batch, MicroBatch, TrainingData, apply_document_mask, batch_digest
from smolds_dist.model.causal_attention import Documents
from smolds_dist.progress import StoppedWaitingError

POLL_SECONDS = 0.2  # seconds
STOP_GRACE_SECONDS = 3.0  # of waiting after a stop request: by then, text ready on one rank is ready on all


class BatchPrefetcher:
    """Assembles batches in the order of the run.

    Args:
        stride: samples from one batch's first to the next one's: the global batch.
        micro_batch: samples of a micro batch.
        end_of_text: the token between documents, if they are masked from each other.
        pinned: assemble into pinned memory, from which a GPU copies asynchronously.
    """

    def __init__(
        self, data: TrainingData, stride: int, micro_batch: int, end_of_text: int | None = None, pinned: bool = False
    ):
        self._data, self._stride, self._micro_batch = data, stride, micro_batch
        self._end_of_text, self._pinned = end_of_text, pinned
        self._pool = ThreadPoolExecutor(1, "batches")
        self._taken = range(0)
        self._next: tuple[range, Future | None] = range(0), None

    def take(self, indices: range, should_stop: Callable[[], bool] = lambda: False) -> Batch:
        """Return these samples of the run.

        Args:
            should_stop: returns True once the run should stop, which ends a longer wait.

        Raises:
            StoppedWaitingError: if it ended the wait.
        """
        self._taken = indices
        pending, future = self._next
        if pending != indices or future is None:
            future = self._pool.submit(self._assemble, indices)
            self._next = indices, future
        asked = 0
        while not wait([future], timeout=POLL_SECONDS).done:
            asked += should_stop()
            if asked * POLL_SECONDS > STOP_GRACE_SECONDS:
                raise StoppedWaitingError
        return future.result()

    def prefetch_next(self) -> None:
        """Start to assemble the batch after the last one taken, unless that has started.

        Call it just before the host waits: Python runs one thread at a time.
        """
        following = range(self._taken.start + self._stride, self._taken.stop + self._stride)
        if self._next[0] != following:
            self._next = following, self._pool.submit(self._assemble, following)

    def _assemble(self, indices: range) -> Batch:
        # Waits for the global batch, so that invalid text fails on all ranks in the same step.
        self._data.wait_for_samples((indices.start // self._stride + 1) * self._stride)
        ids = self._data.batch(indices)
        digest = batch_digest(ids, indices)
        if self._end_of_text is None:
            return Batch([MicroBatch(part, part) for part in self._split(ids)], None, digest)
        positions, labels = apply_document_mask(ids, self._end_of_text)
        parts = map(self._separated, *map(self._split, (ids, labels, positions)))
        return Batch(list(parts), int((labels[:, 1:] >= 0).sum()), digest)

    def _split(self, values: Tensor) -> Sequence[Tensor]:
        return (values.pin_memory() if self._pinned else values).split(self._micro_batch)

    def _separated(self, ids: Tensor, labels: Tensor, positions: Tensor) -> MicroBatch:
        if positions[:, 1:].all():  # one document per sequence
            return MicroBatch(ids, labels)
        bounds = Documents(positions).bounds
        return MicroBatch(ids, labels, positions, bounds.pin_memory() if self._pinned else bounds)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
