"""Order: which tokens of one source its n-th sample has. A pure function of the source's shards, the sequence length and the
seed.

From version 2 on, every epoch runs through the source's units (a file, or several small ones) in a new order. What they
hold, one after the other, is cut into samples of `seq_len` tokens; these are shuffled within windows of consecutive units.
The windows of the first epoch begin small and double, so that a corpus that is still being tokenised can be trained on;
later ones have their full size, which holds a smaller corpus whole. Samples are not listed anywhere: a keyed permutation
says where each one is, so that memory does not depend on their number.

Version 1, in which earlier versions of smolds trained, shuffles all samples of the source.
"""

import hashlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np

VERSION = 2  # of a new run's order; a run keeps its own
FIRST_WINDOW = 2**22  # tokens
UNIT_BYTES = 2**20  # small files travel together up to this size
ROUNDS = 6


class Piece(NamedTuple):
    """A range of a source's training tokens."""

    start: int
    length: int


class Epoch(NamedTuple):
    """One way through a source. Letters: R ranges, W windows."""

    ranges: np.ndarray  # [R] the ranges in this epoch's order
    bounds: np.ndarray  # [R + 1] where each begins in this epoch's stream of tokens, and the end
    windows: np.ndarray  # [W + 1] the first sample of each window, and the end
    keys: np.ndarray  # [W, ROUNDS] of the permutation in each window


class SourceOrder:
    """The order of version 2.

    Args:
        ranges: start and length of parts of the source's training tokens, and the unit of each; units are numbered from 0
            and have one part at least.
        window_tokens: size of a full window.
    """

    version = 2

    def __init__(self, ranges: list[tuple[int, int, int]], seq_len: int, seed: int, window_tokens: int):
        self._starts, self._lengths, units = np.asarray(ranges, dtype=np.int64).reshape(-1, 3).T
        _, self._units = np.unique(units, return_inverse=True)  # some may have no training tokens
        tokens = int(self._lengths.sum())
        self._seq_len, self._seed, self._window = seq_len, seed, window_tokens
        self.num_samples = tokens // seq_len  # of an epoch
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> Epoch:
        count = int(self._units.max()) + 1
        places = permuted(np.arange(count), np.full(count, count), _key(self._seed, epoch, "units")[None])
        ranges = np.argsort(places[self._units], kind="stable")
        bounds = np.concatenate(([0], np.cumsum(self._lengths[ranges])))
        of_unit = self._units[ranges]
        unit_ends = bounds[1:][np.append(of_unit[1:] != of_unit[:-1], True)]
        windows, begin, size = [0], 0, min(FIRST_WINDOW, self._window) if epoch == 0 else self._window
        while begin < bounds[-1]:
            end = int(unit_ends[min(int(np.searchsorted(unit_ends, begin + size)), len(unit_ends) - 1)])
            windows.append(end // self._seq_len)
            begin, size = end, min(2 * size, self._window)
        keys = np.stack([_key(self._seed, epoch, f"window {number}") for number in range(len(windows) - 1)])
        return Epoch(ranges, bounds, np.asarray(windows), keys)

    def pieces(self, positions: np.ndarray) -> list[list[Piece]]:
        """Where the tokens of the source's samples number `positions` [n] are, each `seq_len` in all."""
        epochs, starts = self.starts(positions)
        return [
            self._cut(self._epoch(epoch), start) for epoch, start in zip(epochs.tolist(), starts.tolist(), strict=True)
        ]

    def starts(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For the source's samples number `positions` [n]: the epoch, and where in its stream of tokens each one starts."""
        epochs, places = np.divmod(positions, self.num_samples)
        starts = np.empty(len(positions), np.int64)
        for number in np.unique(epochs):
            epoch, here = self._epoch(int(number)), epochs == number
            window = np.searchsorted(epoch.windows, places[here], "right") - 1
            first, end = epoch.windows[window], epoch.windows[window + 1]
            starts[here] = first + permuted(places[here] - first, end - first, epoch.keys[window])
        return epochs, starts * self._seq_len

    def _cut(self, epoch: Epoch, start: int) -> list[Piece]:
        """The ranges in which `seq_len` tokens from `start` of the epoch's stream on are stored."""
        pieces, end = [], start + self._seq_len
        at = int(np.searchsorted(epoch.bounds, start, "right")) - 1
        while start < end:
            last = min(end, int(epoch.bounds[at + 1]))
            if last > start:
                stored = int(self._starts[epoch.ranges[at]]) + start - int(epoch.bounds[at])
                pieces.append(Piece(stored, last - start))
            start, at = last, at + 1
        return pieces


def units_of(sizes: list[int]) -> list[int]:
    """The unit of each file of a source, whose sizes in bytes are given in the order of the names.

    Small files travel together, up to `UNIT_BYTES`, but not with their neighbours: those are often alike, and the first
    window should be like the whole. So files are taken in a fixed order that has nothing to do with their names.
    """
    order = np.argsort(permuted(np.arange(len(sizes)), np.full(len(sizes), len(sizes)), _key(0, 0, "files")[None]))
    units, unit, size = [0] * len(sizes), -1, UNIT_BYTES
    for file in order.tolist():
        if size + sizes[file] > UNIT_BYTES:
            unit, size = unit + 1, 0
        size += sizes[file]
        units[file] = unit
    return units


class FirstOrder:
    """The order of version 1, for runs that began in it."""

    version = 1

    def __init__(self, tokens: int, seq_len: int, seed: int):
        self.num_samples = tokens // seq_len
        self._seq_len, self._seed = seq_len, seed
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        # RandomState's stream is frozen by NumPy's compatibility policy; default_rng's may change between versions.
        return np.random.RandomState([self._seed % 2**32, epoch]).permutation(self.num_samples)

    def pieces(self, positions: np.ndarray) -> list[list[Piece]]:
        """As `SourceOrder.pieces`."""
        epochs, places = np.divmod(positions, self.num_samples)
        samples = (int(self._epoch(int(e))[p]) for e, p in zip(epochs, places, strict=True))
        return [[Piece(sample * self._seq_len, self._seq_len)] for sample in samples]


def permuted(index_N: np.ndarray, size_N: np.ndarray, key_NR: np.ndarray) -> np.ndarray:
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
            left, right = right, left ^ (_mixed(right + keys[:, number]) & mask)
        out_N[walking] = (left << bits) | right
        walking = walking[out_N[walking] >= size_N[walking]]
    return out_N.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, modulo 2^64 (G. Steele, D. Lea, C. Flood, OOPSLA 2014, figure 17)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(seed: int, epoch: int, what: str) -> np.ndarray:
    """Round keys [ROUNDS] of uint64."""
    digest = hashlib.blake2b(f"{VERSION} {seed} {epoch} {what}".encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8")
