"""Order: which tokens the n-th sample of a source has; a pure function of the source's shards, sequence length and seed.
`data.staged_order` continues it where the sequence length changes.

A shard is the unit of tokenization: a chunk of a large file, a file, or several small files. Every epoch takes the shards
in a new order. Their concatenated tokens are split into samples of `seq_len` tokens, or their documents are packed into
samples. Samples are shuffled within windows of consecutive shards. The windows of the first epoch start small and double,
so that training can start while the corpus is being tokenized; later epochs use the full size, which can hold a small
corpus completely. Samples are never listed: a keyed permutation locates each one, so memory does not depend on their number.
"""

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

VERSION = 3  # of the order; checkpoints of other versions are rejected
FIRST_WINDOW = 2**22  # tokens
ROUNDS = 6
PACKED_WINDOWS = 4  # windows whose samples are cached


class TokenSpan(NamedTuple):
    """A range of a shard's training tokens."""

    shard: int
    start: int
    length: int


# From shards in the order of need to the spans of the first one. If its tokens are missing: wait for them if the second
# argument is True, else return None.
SpansIn = Callable[[np.ndarray, bool], list[TokenSpan] | None]
# From a window's spans to its samples, each a list of spans.
Pack = Callable[[list[TokenSpan]], list[list[TokenSpan]]]


@dataclass(eq=False)
class Epoch:
    """One pass through a source, as far as it is known. Letters: U shards."""

    shards: np.ndarray  # [U] in this epoch's order
    size: int  # of the next window, in tokens
    taken: int = 0  # shards that `spans` and `pending` come from
    spans: list[TokenSpan] = field(default_factory=list)  # of the windows, in this epoch's order
    bounds: list[int] = field(default_factory=lambda: [0])  # start of each span in the epoch's tokens, and the end
    windows: list[int] = field(default_factory=lambda: [0])  # the first sample of each window, and the end
    spans_until: list[int] = field(default_factory=lambda: [0])  # spans before each window, and their total
    shards_until: list[int] = field(default_factory=list)  # shards up to each window's end
    keys: list[np.ndarray] = field(default_factory=list)  # [ROUNDS] of the permutation in each window
    sizes: list[int] = field(default_factory=list)  # `size` after each window
    pending: list[TokenSpan] = field(default_factory=list)  # spans of the next window
    consumed: int = 0  # tokens of the epoch with another sequence length before these
    begin: int = 0  # shards whose tokens are all among these
    complete: bool = False
    _arrays: tuple[np.ndarray, np.ndarray] | None = None

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """`windows` [W + 1] and `keys` [W, ROUNDS]."""
        if self._arrays is None or len(self._arrays[0]) != len(self.windows):
            self._arrays = np.asarray(self.windows), np.stack(self.keys)
        return self._arrays


class SampleOrder:
    """The sample order of a source; thread-safe.

    Args:
        shards: number of shards.
        window_tokens: size of a full window.
        pack: packs a window's documents into samples; if unset, its token stream is split.
        rest: number and rest of the epoch to begin with; default: all of the first one.
    """

    def __init__(
        self,
        shards: int,
        spans_in: SpansIn,
        seq_len: int,
        seed: int,
        window_tokens: int,
        pack: Pack | None = None,
        rest: tuple[int, Epoch] | None = None,
    ):
        self._shards, self._spans_in, self._pack, self.packs = shards, spans_in, pack, pack is not None
        self._seq_len, self._seed, self._window = seq_len, seed, window_tokens
        self._keys_of = f"length {seq_len} " if rest else ""
        self._number, self._first = rest or (0, self._new_epoch(0))
        self._later: tuple[int, Epoch] | None = None  # the one used last
        self._ends: list[int] = []  # samples up to the end of each finished epoch, if documents are packed
        self._packed = lru_cache(PACKED_WINDOWS)(self._pack_window)
        self._lock = threading.RLock()

    def _new_epoch(self, number: int) -> Epoch:
        key = self._round_keys(number, "units")[None]
        positions = permute_index(np.arange(self._shards), np.full(self._shards, self._shards), key)
        return Epoch(np.argsort(positions), min(FIRST_WINDOW, self._window) if number == 0 else self._window)

    def _epoch(self, number: int, sample: int | None = None) -> Epoch:
        """Return an epoch, known up to that sample of it, or completely."""
        if number == self._number:
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
        """True if the number of samples per epoch is known."""
        return self._first.complete

    @property
    def num_tokens(self) -> int:
        """Tokens of the first epoch in the known windows."""
        return self._first.bounds[-1]

    @property
    def num_known(self) -> int:
        """Samples of the first epoch in the known shards."""
        return (self.num_tokens + sum(span.length for span in self._first.pending)) // self._seq_len

    @property
    def num_samples(self) -> int:
        """Samples per epoch; waits for the last shard."""
        self.extend(None)
        return self._first.windows[-1]

    def extend(self, sample: int | None, wait: bool = True) -> bool:
        """Determine the first epoch up to the window of that sample, or completely if None.

        Returns:
            False if shards are missing and `wait` is False.
        """
        epoch = self._first
        while True:
            with self._lock:
                while not epoch.complete and (sample is None or epoch.windows[-1] <= sample):
                    if not self._add_window(epoch, self._number):
                        break
                else:
                    return True
                missing = self.wanted_shards()
            if not wait:
                return False
            self._spans_in(missing, True)  # without the lock: other threads may read known windows

    def wanted_shards(self) -> np.ndarray:
        """Return the shards of the first epoch that are not known yet, in their order."""
        return self._first.shards[self._first.taken :]

    def shards_until(self, sample: int) -> np.ndarray:
        """Return the first epoch's shards up to the end of the window of that sample; for later epochs, all shards."""
        self.extend(sample)
        if self._number:
            return self._first.shards
        ends = self._first.windows
        window = int(np.searchsorted(ends, sample, "right")) - 1
        last = self._first.shards_until[window] if window < len(ends) - 1 else self._shards
        return self._first.shards[:last]

    def _add_window(self, epoch: Epoch, number: int) -> bool:
        """Add the next window; return False if one of its shards is missing."""
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
            epoch.keys.append(self._round_keys(number, f"{self._keys_of}window {len(epoch.keys)}"))
            epoch.spans_until.append(len(epoch.spans))
            if self._pack is None:
                epoch.windows.append(epoch.bounds[-1] // self._seq_len)
            else:
                epoch.windows.append(epoch.windows[-1] + len(self._packed(number, len(epoch.windows) - 1, epoch)))
            epoch.shards_until.append(epoch.taken)
            epoch.pending, epoch.size = [], min(2 * epoch.size, self._window)
            epoch.sizes.append(epoch.size)
        epoch.complete = epoch.taken == len(epoch.shards)
        return True

    def spans(self, positions: np.ndarray) -> list[list[TokenSpan]]:
        """Return the token spans of these samples of the source [n]: `seq_len` tokens each, or fewer if packed."""
        epochs, indices = self.locate(positions)
        with self._lock:
            return list(map(self._split_sample, epochs.tolist(), indices.tolist()))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for these samples of the source [n] the epoch, and the index in it before shuffling."""
        if not len(positions):
            return positions, positions
        self.extend(int(positions.max()))
        with self._lock:
            epochs, within = self._epochs(positions)
            indices = np.empty(len(positions), np.int64)
            for number in np.unique(epochs):
                here = epochs == number
                epoch = self._epoch(int(number), int(within[here].max()))
                windows, keys = epoch.arrays()
                window = np.searchsorted(windows, within[here], "right") - 1
                first, end = windows[window], windows[window + 1]
                indices[here] = first + permute_index(within[here] - first, end - first, keys[window])
        return epochs, indices

    def _epochs(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return epochs and the indices in them."""
        if self._pack:
            return self._packed_epochs(positions)
        if not self.complete:
            return np.full_like(positions, self._number), positions
        begun, full = self._first.windows[-1], (self._first.consumed + self.num_tokens) // self._seq_len
        epochs, within = np.divmod(positions - begun, full)
        first = positions < begun
        return np.where(first, 0, epochs + 1) + self._number, np.where(first, positions, within)

    def _packed_epochs(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return epochs and the indices in them, if epochs differ in their number of samples."""
        last = int(positions.max())
        while self._ends or self.complete:
            number = self._number + len(self._ends)
            begin = self._ends[-1] if self._ends else 0
            if last < begin:
                break
            epoch = self._epoch(number, last - begin)
            if not epoch.complete or last < begin + epoch.windows[-1]:
                break
            self._ends.append(begin + epoch.windows[-1])
        epochs = np.searchsorted(self._ends, positions, "right")
        return epochs + self._number, positions - np.array([0, *self._ends])[epochs]

    def _pack_window(self, _number: int, window: int, epoch: Epoch) -> list[list[TokenSpan]]:
        assert self._pack
        return self._pack(epoch.spans[slice(*epoch.spans_until[window : window + 2])])

    def _split_sample(self, number: int, index: int) -> list[TokenSpan]:
        epoch = self._epoch(number, index)
        if self._pack:
            window = bisect_right(epoch.windows, index) - 1
            return self._packed(number, window, epoch)[index - epoch.windows[window]]
        return spans_between(epoch, index * self._seq_len, (index + 1) * self._seq_len)

    def _round_keys(self, epoch: int, text: str) -> np.ndarray:
        return round_keys(f"{VERSION} {self._seed} {epoch} {text}")

    def rest(self, sample: int) -> tuple[int, Epoch]:
        """Return the number of that sample's epoch, and the tokens of it that no earlier sample of the source has.

        They are, in the epoch's order, those of its window's later samples, then those of the shards after the window.
        """
        self.extend(sample)
        with self._lock:
            (number,), (within,) = (found.tolist() for found in self._epochs(np.array([sample])))
            epoch = self._epoch(number, within)
            window = bisect_right(epoch.windows, within) - 1
            first, end = epoch.windows[window : window + 2]
            later = np.arange(within - first, end - first)
            keys = epoch.keys[window][None]
            left = np.sort(first + permute_index(later, np.full(len(later), end - first), keys))
            known = epoch.bounds[epoch.spans_until[window + 1]]
            if self._pack:
                place = {shard: at for at, shard in enumerate(epoch.shards.tolist())}
                packed = self._packed(number, window, epoch)
                spans = sorted((s for at in left - first for s in packed[at]), key=lambda s: (place[s.shard], s.start))
            else:
                runs = np.split(left, np.flatnonzero(np.diff(left) > 1) + 1) if len(left) else []
                ranges = [(int(run[0]) * self._seq_len, (int(run[-1]) + 1) * self._seq_len) for run in runs]
                spans = [s for begin, stop in ranges for s in spans_between(epoch, begin, stop)]
                spans += spans_between(epoch, end * self._seq_len, known)
            begun = epoch.shards_until[window - 1] - 1 if window else epoch.begin
            return number, Epoch(
                epoch.shards,
                epoch.sizes[window],
                epoch.shards_until[window],
                pending=joined(spans),
                consumed=epoch.consumed + known - sum(span.length for span in spans),
                begin=max(0, begun),
            )


def spans_between(epoch: Epoch, start: int, end: int) -> list[TokenSpan]:
    """Return the spans of an epoch's tokens from `start` to `end`."""
    spans, at = [], bisect_right(epoch.bounds, start) - 1
    while start < end:
        last = min(end, epoch.bounds[at + 1])
        if last > start:
            span = epoch.spans[at]
            spans.append(TokenSpan(span.shard, span.start + start - epoch.bounds[at], last - start))
        start, at = last, at + 1
    return spans


def joined(spans: list[TokenSpan]) -> list[TokenSpan]:
    """Join spans that follow each other in a shard."""
    found: list[TokenSpan] = []
    for span in spans:
        if found and found[-1].shard == span.shard and found[-1].start + found[-1].length == span.start:
            span = TokenSpan(span.shard, found[-1].start, found.pop().length + span.length)
        found.append(span)
    return found


def permute_index(index_N: np.ndarray, size_N: np.ndarray, key_NR: np.ndarray) -> np.ndarray:
    """Return where a permutation of `size` items puts `index`, for N independent permutations chosen by their keys.

    A Feistel network on the smallest square of a power of two that holds `size`, applied until the result is below `size`
    (J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, section 5). Uses 64-bit integer arithmetic
    only, so that no library version changes it.

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
    """Apply the finalizer of SplitMix64, modulo 2^64 (G. Steele, D. Lea, C. Flood, OOPSLA 2014, figure 17)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def round_keys(text: str) -> np.ndarray:
    """Return round keys [ROUNDS] of uint64."""
    digest = hashlib.blake2b(text.encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8")
