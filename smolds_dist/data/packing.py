"""Packing: place documents into samples, so that few are split."""

from collections.abc import Callable

import numpy as np

from smolds_dist.data.order import TokenSpan


def best_fit(spans: list[TokenSpan], table: Callable[[int], np.ndarray], seq_len: int) -> list[list[TokenSpan]]:
    """Pack a window into samples of at most `seq_len` tokens; no document that fits into one sample is split.

    Best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830, section 3): documents longer
    than a sample are split into spans of its length; the rest of them and all others are placed, longest first, into the
    fullest sample with room. Remaining room is padded with end-of-text tokens, which are never predicted.

    Args:
        spans: of the window; each starts with a document.
        table: returns a shard's document table, one row per document.
    """
    items = [item for span in spans for item in _packing_items(span, table(span.shard)["start"], seq_len)]
    samples: list[list[TokenSpan]] = []
    roomy: list[list[int]] = [[] for _ in range(seq_len + 1)]  # samples by their free tokens
    rooms = 0  # bit n: some sample has n free tokens
    for item in sorted(items, key=lambda item: -item.length):
        fitting = rooms >> item.length
        if fitting:
            room = item.length + (fitting & -fitting).bit_length() - 1  # the smallest sufficient room
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
    """Return the documents of a span; longer ones as spans of a sample's length and a remainder."""
    first, end = np.searchsorted(starts, np.array([span.start + 1, span.start + span.length], dtype=np.uint64))
    begins = np.append(span.start, starts[first:end].astype(np.int64))  # the span may begin within a document
    ends = np.append(begins[1:], span.start + span.length)
    items = []
    for begin, stop in zip(begins.tolist(), ends.tolist(), strict=True):
        items += [TokenSpan(span.shard, at, min(seq_len, stop - at)) for at in range(begin, stop, seq_len)]
    return items
