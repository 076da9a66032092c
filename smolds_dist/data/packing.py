"""Packing: the documents of a window put into samples so that none is cut which fits into one.

Best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830, section 3): documents longer than
a sample are cut into pieces of its length; what is left and all others go, the longest first, into the fullest sample that
has room for them. What stays empty is filled up with end-of-text tokens, of which none is predicted.
"""

from collections.abc import Callable

import numpy as np

from smolds_dist.data.order import Piece


def best_fit(pieces: list[Piece], table: Callable[[int], np.ndarray], seq_len: int) -> list[list[Piece]]:
    """The samples of a window: for each the pieces in it, `seq_len` tokens at most.

    Args:
        pieces: of the window; each begins with a document.
        table: of a unit, with a row for each document.
    """
    items = [item for piece in pieces for item in _items(piece, table(piece.unit)["start"], seq_len)]
    samples: list[list[Piece]] = []
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


def _items(piece: Piece, starts: np.ndarray, seq_len: int) -> list[Piece]:
    """Documents in a piece, longer ones in parts of a sample's length and a rest."""
    first, end = np.searchsorted(starts, np.array([piece.start, piece.start + piece.length], dtype=np.uint64))
    begins = starts[first:end].astype(np.int64)
    ends = np.append(begins[1:], piece.start + piece.length)
    items = []
    for begin, stop in zip(begins.tolist(), ends.tolist(), strict=True):
        items += [Piece(piece.unit, at, min(seq_len, stop - at)) for at in range(begin, stop, seq_len)]
    return items
