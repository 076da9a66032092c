"""Prefetch: a thread assembles a rank's slice of the next batch while the model trains on the current one."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from torch import Tensor

from smolds_dist.data.batch import (
    Batch,
    MicroBatch,
    TrainingData,
    apply_document_mask,
    batch_digest,
)
from smolds_dist.model.causal_attention import Documents
from smolds_dist.progress import StoppedWaitingError

POLL_SECONDS = 0.2  # seconds
STOP_GRACE_SECONDS = 3.0  # of waiting after a stop request: by then, text ready on one rank is ready on all


class BatchPrefetcher:
    """Assembles batches in the order of the run.

    Args:
        rank: this rank, and the number of ranks.
        micro_batches: samples of a micro batch in each stage of the run.
        pinned: assemble into pinned memory, from which a GPU copies asynchronously.
    """

    def __init__(self, data: TrainingData, rank: tuple[int, int], micro_batches: Sequence[int], pinned: bool = False):
        self._data, self._rank, self._micro_batches, self._pinned = data, rank, micro_batches, pinned
        self._pool = ThreadPoolExecutor(1, "batches")
        self._taken = 0
        self._next: tuple[int, Future | None] = 0, None

    def take(self, step: int, should_stop: Callable[[], bool] = lambda: False) -> Batch:
        """Return this rank's samples of a step of the data.

        Args:
            should_stop: returns True once the run should stop, which ends a longer wait.

        Raises:
            StoppedWaitingError: if it ended the wait.
        """
        self._taken = step
        pending, future = self._next
        if pending != step or future is None:
            future = self._pool.submit(self._assemble, step)
            self._next = step, future
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
        following = self._taken + 1
        if self._next[0] != following:
            self._next = following, self._pool.submit(self._assemble, following)

    def _assemble(self, step: int) -> Batch:
        rank, world = self._rank
        stages = self._data.stages
        whole, stage = stages.batch(step), stages.at(step)
        # Waits for the global batch, so that invalid text fails on all ranks in the same step.
        self._data.wait_for_samples(whole.stop)
        indices = whole[rank * len(whole) // world : (rank + 1) * len(whole) // world]
        ids = self._data.batch(indices)
        digest = batch_digest(ids, indices)
        size = self._micro_batches[stage.number - 1]
        if not stage.config.data.document_mask:
            return Batch([MicroBatch(part, part) for part in self._split(ids, size)], None, digest)
        positions, labels = apply_document_mask(ids, self._data.tokenizer.eos_token_id)
        parts = map(self._separated, *(self._split(values, size) for values in (ids, labels, positions)))
        return Batch(list(parts), int((labels[:, 1:] >= 0).sum()), digest)

    def _split(self, values: Tensor, size: int) -> Sequence[Tensor]:
        return (values.pin_memory() if self._pinned else values).split(size)

    def _separated(self, ids: Tensor, labels: Tensor, positions: Tensor) -> MicroBatch:
        if positions[:, 1:].all():  # one document per sequence
            return MicroBatch(ids, labels)
        bounds = Documents(positions).bounds
        return MicroBatch(ids, labels, positions, bounds.pin_memory() if self._pinned else bounds)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
