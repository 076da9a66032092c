"""The order of a source whose sequence length changes during the run: where it does, the rest of the epoch is split again.

No token is lost or comes twice: the new samples hold the tokens of the epoch that no earlier sample has, and the next
epoch begins when they are used up. A change in the middle of a window shuffles what is left of it with the next one.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable

import numpy as np

from smolds_dist.data.order import SampleOrder, TokenSpan


class StagedOrder:
    """Sample orders of one sequence length after another; thread-safe.

    Args:
        lengths: the first sample of the source with each sequence length, from 0, and that length in tokens.
        make: makes the order of a sequence length, from the start or from `SampleOrder.rest`.
    """

    def __init__(self, lengths: list[tuple[int, int]], make: Callable[..., SampleOrder]):
        self._begins = [first for first, _ in lengths]
        self._lengths = [length for _, length in lengths]
        self._make = make
        self._orders = [make(self._lengths[0])]
        self._lock = threading.Lock()

    def _at(self, sample: int) -> tuple[SampleOrder, int]:
        """Return the order that has a sample of the source, and the sample's number in it; waits for missing tokens."""
        number = bisect_right(self._begins, sample) - 1
        while len(self._orders) <= number:
            known = len(self._orders)
            taken = self._begins[known] - self._begins[known - 1]
            rest = self._orders[known - 1].rest(taken)
            with self._lock:
                if len(self._orders) == known:
                    self._orders.append(self._make(self._lengths[known], rest))
        return self._orders[number], sample - self._begins[number]

    def lengths_of(self, positions: np.ndarray) -> np.ndarray:
        """Return the sequence lengths of these samples of the source [n]."""
        return np.array(self._lengths)[np.searchsorted(self._begins, positions, "right") - 1]

    @property
    def complete(self) -> bool:
        """True if the number of tokens per epoch is known."""
        first = self._orders[0]
        if len(self._orders) > 1 and not first.packs:  # no sample extends it any more; packing would take long
            first.extend(None, wait=False)
        return first.complete

    @property
    def num_tokens(self) -> int:
        """Tokens of the first epoch in the windows known to the first sequence length."""
        return self._orders[0].num_tokens

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of an epoch's samples of the first sequence length; waits for the last shard."""
        return self.num_samples * self._lengths[0]

    @property
    def num_samples(self) -> int:
        """Samples per epoch of the first sequence length; waits for the last shard."""
        return self._orders[0].num_samples

    @property
    def num_known(self) -> int:
        """Samples of the first epoch in the known shards."""
        return self._begins[len(self._orders) - 1] + self._orders[-1].num_known

    def extend(self, sample: int | None, wait: bool = True) -> bool:
        """Determine the order up to that sample, or the first epoch with the first sequence length if None.

        Returns:
            False if shards are missing and `wait` is False.
        """
        if sample is None:
            return self._orders[0].extend(None, wait)
        for number, begin in enumerate(self._begins):
            if begin > sample:
                break
            order, _ = self._at(begin)  # known, because the order before it is known up to here
            following = self._begins[number + 1 :]
            last = following[0] if following and following[0] <= sample else sample
            if not order.extend(last - begin, wait):
                return False
        return True

    def wanted_shards(self) -> np.ndarray:
        """Return the shards of the first epoch that are not known yet, in their order."""
        return self._orders[-1].wanted_shards()

    def shards_until(self, sample: int) -> np.ndarray:
        """Return the first epoch's shards up to the end of the window of that sample; for later epochs, all shards."""
        order, number = self._at(sample)
        return order.shards_until(number)

    def spans(self, positions: np.ndarray) -> list[list[TokenSpan]]:
        """Return the token spans of these samples of the source [n]."""
        found: list[list[TokenSpan]] = [[]] * len(positions)
        numbers = np.searchsorted(self._begins, positions, "right") - 1
        for number in np.unique(numbers).tolist():
            here = np.flatnonzero(numbers == number)
            order, _ = self._at(self._begins[number])
            for place, spans in zip(here.tolist(), order.spans(positions[here] - self._begins[number]), strict=True):
                found[place] = spans
        return found
