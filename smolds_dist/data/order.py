"""Order: which tokens of one source its n-th sample has. A pure function of the source's units, the sequence length and the
seed.

A unit is what is tokenised at once: a part of a large file, a file, or several small ones. Every epoch runs through the
units in a new order. What they hold, one after the other, is cut into samples of `seq_len` tokens, or its
documents are packed into samples; these are shuffled within windows of consecutive units. The windows of the first epoch
begin small and double, so that a corpus that is still being tokenised can be trained on; later ones have their full size,
which holds a smaller corpus whole. Samples are not listed anywhere: a keyed permutation says where each one is, so that
memory does not depend on their number.
"""

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

VERSION = 3  # of the order; a checkpoint of another one is refused
FIRST_WINDOW = 2**22  # tokens
ROUNDS = 6
PACKED_WINDOWS = 4  # whose samples are kept


class TokenSpan(NamedTuple):
    """A range of a unit's training tokens."""

    shard: int
    start: int
    length: int


# From units in the order in which they are wanted to the pieces of the first. Where its tokens are not there yet, it waits
# for them, or returns None if it is not to.
SpansIn = Callable[[np.ndarray, bool], list[TokenSpan] | None]
# From a window's pieces to its samples, each of them pieces again.
Pack = Callable[[list[TokenSpan]], list[list[TokenSpan]]]


@dataclass(eq=False)
class Epoch:
    """One way through a source, as far as it is known. Letters: U units."""

    shards: np.ndarray  # [U] in this epoch's order
    size: int  # of the next window, in tokens
    taken: int = 0  # units that `spans` and `pending` come from
    spans: list[TokenSpan] = field(default_factory=list)  # of the windows, in this epoch's order
    bounds: list[int] = field(default_factory=lambda: [0])  # where each piece begins in the epoch's tokens, and the end
    windows: list[int] = field(default_factory=lambda: [0])  # the first sample of each window, and the end
    spans_until: list[int] = field(default_factory=lambda: [0])  # pieces up to each window's beginning, and the end
    shards_until: list[int] = field(default_factory=list)  # units up to each window's end
    keys: list[np.ndarray] = field(default_factory=list)  # [ROUNDS] of the permutation in each window
    pending: list[TokenSpan] = field(default_factory=list)  # of the window to come
    complete: bool = False
    _arrays: tuple[np.ndarray, np.ndarray] | None = None

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """`windows` [W + 1] and `keys` [W, ROUNDS]."""
        if self._arrays is None or len(self._arrays[0]) != len(self.windows):
            self._arrays = np.asarray(self.windows), np.stack(self.keys)
        return self._arrays


class SampleOrder:
    """The order of a source. Several threads may ask it.

    Args:
        units: how many there are.
        window_tokens: size of a full window.
        pack: makes samples of a window's documents; without, its stream of tokens is cut.
    """

    def __init__(
        self,
        shards: int,
        spans_in: SpansIn,
        seq_len: int,
        seed: int,
        window_tokens: int,
        pack: Pack | None = None,
    ):
        self._shards, self._spans_in, self._pack = shards, spans_in, pack
        self._seq_len, self._seed, self._window = seq_len, seed, window_tokens
        self._first = self._new_epoch(0)
        self._later: tuple[int, Epoch] | None = None  # the one that was last asked for
        self._ends: list[int] = []  # samples up to each epoch's end, of those gone through, where documents are packed
        self._packed = lru_cache(PACKED_WINDOWS)(self._pack_window)
        self._lock = threading.RLock()

    def _new_epoch(self, number: int) -> Epoch:
        key = self._round_keys(number, "units")[None]
        indices = permute_index(np.arange(self._shards), np.full(self._shards, self._shards), key)
        return Epoch(np.argsort(indices), min(FIRST_WINDOW, self._window) if number == 0 else self._window)

    def _epoch(self, number: int, sample: int | None = None) -> Epoch:
        """One of them, known up to that sample of it, or whole."""
        if number == 0:
            self.extend(sample)
            return self._first
        if self._later is None or self._later[0] != number:
            self._later = number, self._new_epoch(number)
        epoch = self._later[1]
        while not epoch.complete and (sample is None or epoch.windows[-1] <= sample):
            self._add_window(epoch, number)
        return epoch

    @property
    def complete(self) -> bool:
        """Whether it is known how many samples an epoch has."""
        return self._first.complete

    @property
    def num_tokens(self) -> int:
        """Of the first epoch, so far as windows are known."""
        return self._first.bounds[-1]

    @property
    def num_known(self) -> int:
        """Samples of the first epoch, so far as units are known."""
        return (self.num_tokens + sum(span.length for span in self._first.pending)) // self._seq_len

    @property
    def num_samples(self) -> int:
        """Of an epoch; waits for the last unit."""
        self.extend(None)
        return self._first.windows[-1]

    def extend(self, sample: int | None, wait: bool = True) -> bool:
        """Gets to know the first epoch up to the window with that sample, or, with None, all of it.

        Returns:
            False where it is not to wait, and would have to.
        """
        epoch = self._first
        while True:
            with self._lock:
                while not epoch.complete and (sample is None or epoch.windows[-1] <= sample):
                    if not self._add_window(epoch, 0):
                        break
                else:
                    return True
                missing = self.wanted_shards()
            if not wait:
                return False
            self._spans_in(missing, True)  # without the lock: others may ask for what is known

    def wanted_shards(self) -> np.ndarray:
        """Units of the first epoch that are not known yet, in their order."""
        return self._first.shards[self._first.taken :]

    def shards_until(self, sample: int) -> np.ndarray:
        """The first epoch's units up to the end of the window with that sample; in later epochs, all."""
        self.extend(sample)
        ends = self._first.windows
        window = int(np.searchsorted(ends, sample, "right")) - 1
        last = self._first.shards_until[window] if window < len(ends) - 1 else self._shards
        return self._first.shards[:last]

    def window_of(self, sample: int) -> tuple[int, int]:
        """The epoch that a sample of the source is in, and the window there."""
        (number,), (index,) = (found.tolist() for found in self.locate(np.array([sample])))
        with self._lock:
            return number, bisect_right(self._epoch(number, index).windows, index) - 1

    def consumed_shards(self, sample: int) -> np.ndarray:
        """Units of the windows of its epoch that lie before the one of that sample."""
        number, window = self.window_of(sample)
        with self._lock:
            epoch = self._epoch(number, 0)
            # The last of them may hold the beginning of a sample that ends in the next window.
            return epoch.shards[: max(0, epoch.shards_until[window - 1] - 1) if window else 0]

    def upcoming_shards(self, sample: int) -> np.ndarray:
        """Units of the window of that sample and of the next one, as far as they are known."""
        number, window = self.window_of(sample)
        with self._lock:
            epoch = self._epoch(number, 0)
            begin = epoch.shards_until[window - 1] if window else 0
            return epoch.shards[begin : epoch.shards_until[min(window + 1, len(epoch.shards_until) - 1)]]

    def _add_window(self, epoch: Epoch, number: int) -> bool:
        """Whether all of the next window is known."""
        size = sum(span.length for span in epoch.pending)
        while size < epoch.size and epoch.taken < len(epoch.shards):
            spans = self._spans_in(epoch.shards[epoch.taken :], False)
            if spans is None:
                return False
            epoch.pending += spans
            epoch.taken += 1
            size += sum(span.length for span in spans)
        if size:
            for span in epoch.pending:
                epoch.bounds.append(epoch.bounds[-1] + span.length)
            epoch.spans += epoch.pending
            epoch.keys.append(self._round_keys(number, f"window {len(epoch.keys)}"))
            epoch.spans_until.append(len(epoch.spans))
            if self._pack is None:
                epoch.windows.append(epoch.bounds[-1] // self._seq_len)
            else:
                epoch.windows.append(epoch.windows[-1] + len(self._packed(number, len(epoch.windows) - 1, epoch)))
            epoch.shards_until.append(epoch.taken)
            epoch.pending, epoch.size = [], min(2 * epoch.size, self._window)
        epoch.complete = epoch.taken == len(epoch.shards)
        return True

    def spans(self, positions: np.ndarray) -> list[list[TokenSpan]]:
        """Where the tokens of the source's samples number `positions` [n] are, `seq_len` in all, or fewer where documents
        are packed."""
        epochs, indices = self.locate(positions)
        with self._lock:
            return list(map(self._split_sample, epochs.tolist(), indices.tolist()))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For the source's samples number `positions` [n]: the epoch, and which one it is there before shuffling."""
        if not len(positions):
            return positions, positions
        self.extend(int(positions.max()))
        with self._lock:
            if self._pack:
                epochs, within = self._packed_epochs(positions)
            elif self.complete:
                epochs, within = np.divmod(positions, self._first.windows[-1])
            else:
                epochs, within = np.zeros_like(positions), positions
            indices = np.empty(len(positions), np.int64)
            for number in np.unique(epochs):
                here = epochs == number
                epoch = self._epoch(int(number), int(within[here].max()))
                windows, keys = epoch.arrays()
                window = np.searchsorted(windows, within[here], "right") - 1
                first, end = windows[window], windows[window + 1]
                indices[here] = first + permute_index(within[here] - first, end - first, keys[window])
        return epochs, indices

    def _packed_epochs(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epochs, and the places in them, where epochs differ in the number of their samples."""
        last = int(positions.max())
        while self._ends or self.complete:
            number = len(self._ends)
            begin = self._ends[-1] if self._ends else 0
            if last < begin:
                break
            epoch = self._epoch(number, last - begin)
            if not epoch.complete or last < begin + epoch.windows[-1]:
                break
            self._ends.append(begin + epoch.windows[-1])
        epochs = np.searchsorted(self._ends, positions, "right")
        return epochs, positions - np.array([0, *self._ends])[epochs]

    def _pack_window(self, _number: int, window: int, epoch: Epoch) -> list[list[TokenSpan]]:
        assert self._pack
        return self._pack(epoch.spans[slice(*epoch.spans_until[window : window + 2])])

    def _split_sample(self, number: int, index: int) -> list[TokenSpan]:
        epoch = self._epoch(number, index)
        if self._pack:
            window = bisect_right(epoch.windows, index) - 1
            return self._packed(number, window, epoch)[index - epoch.windows[window]]
        start, end = index * self._seq_len, (index + 1) * self._seq_len
        spans, at = [], bisect_right(epoch.bounds, start) - 1
        while start < end:
            last = min(end, epoch.bounds[at + 1])
            if last > start:
                whole = epoch.spans[at]
                spans.append(TokenSpan(whole.shard, whole.start + start - epoch.bounds[at], last - start))
            start, at = last, at + 1
        return spans

    def _round_keys(self, epoch: int, text: str) -> np.ndarray:
        return round_keys(f"{VERSION} {self._seed} {epoch} {text}")


def permute_index(index_N: np.ndarray, size_N: np.ndarray, key_NR: np.ndarray) -> np.ndarray:
    """Where a permutation of `size` things puts `index`: N independent ones, chosen by their keys.

    A Feistel network on the smallest square of a power of two that holds `size`, walked until it leads to a place below it
    (J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, section 5). Built of 64-bit integer arithmetic
    alone, so that no library's version changes it.

    Args:
        index_N: 0 <= index < size.
        size_N: up to 2^62.
        key_NR: uint64 keys of `ROUNDS` rounds; one row for all, or a row for each.
    """
    sizes, which_N = np.unique(size_N, return_inverse=True)
    bits_N = np.array([max(1, (int(size - 1).bit_length() + 1) // 2) for size in sizes], dtype=np.uint64)[which_N]
    mask_N = (np.uint64(1) << bits_N) - np.uint64(1)
    keys_NR = np.broadcast_to(key_NR, (len(index_N), ROUNDS))
    size_N = size_N.astype(np.uint64)
    out_N = index_N.astype(np.uint64)
    walking = np.arange(len(out_N))
    while len(walking):
        bits, mask, keys = bits_N[walking], mask_N[walking], keys_NR[walking]
        left, right = out_N[walking] >> bits, out_N[walking] & mask
        for number in range(ROUNDS):
            left, right = right, left ^ (_mix64(right + keys[:, number]) & mask)
        out_N[walking] = (left << bits) | right
        walking = walking[out_N[walking] >= size_N[walking]]
    return out_N.astype(np.int64)


def _mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, modulo 2^64 (G. Steele, D. Lea, C. Flood, OOPSLA 2014, figure 17)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def round_keys(text: str) -> np.ndarray:
    """Round keys [ROUNDS] of uint64."""
    digest = hashlib.blake2b(text.encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8")


def best_fit(spans: list[TokenSpan], table: Callable[[int], np.ndarray], seq_len: int) -> list[list[TokenSpan]]:
    """The samples of a window: for each the pieces in it, `seq_len` tokens at most. No document is cut that fits into one.

    Best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830, section 3): documents longer
    than a sample are cut into pieces of its length; what is left and all others go, the longest first, into the fullest
    sample that has room for them. What stays empty is filled up with end-of-text tokens, of which none is predicted.

    Args:
        pieces: of the window; each begins with a document.
        table: of a unit, with a row for each document.
    """
    items = [item for span in spans for item in _packing_items(span, table(span.shard)["start"], seq_len)]
    samples: list[list[TokenSpan]] = []
    roomy: list[list[int]] = [[] for _ in range(seq_len + 1)]  # samples by the room that they have
    rooms = 0  # bit n: some sample has room for n tokens
    for item in sorted(items, key=lambda item: -item.length):
        fitting = rooms >> item.length
        if fitting:
            room = item.length + (fitting & -fitting).bit_length() - 1  # the least that is enough
            sample = roomy[room].pop()
            if not roomy[room]:
                rooms ^= 1 << room
            samples[sample].append(item)
        else:
            room, sample = seq_len, len(samples)
            samples.append([item])
        left = room - item.length
        if left:
            roomy[left].append(sample)
            rooms |= 1 << left
    return samples


def _packing_items(span: TokenSpan, starts: np.ndarray, seq_len: int) -> list[TokenSpan]:
    """Documents in a piece, longer ones in parts of a sample's length and a rest."""
    first, end = np.searchsorted(starts, np.array([span.start, span.start + span.length], dtype=np.uint64))
    begins = starts[first:end].astype(np.int64)
    ends = np.append(begins[1:], span.start + span.length)
    items = []
    for begin, stop in zip(begins.tolist(), ends.tolist(), strict=True):
        items += [TokenSpan(span.shard, at, min(seq_len, stop - at)) for at in range(begin, stop, seq_len)]
    return items
