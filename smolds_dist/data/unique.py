"""Unique content: how many distinct texts a run has been trained on, against how many it has seen.

A text counts when the sample with its first token is trained on, and is known by its first 50 tokens. Up to 2^20 distinct
texts are counted exactly; from there on a HyperLogLog sketch estimates them, with a standard error of 0.8 % (P. Flajolet
et al., 2007; the sketch is that of Apache DataSketches).
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from smolds_dist.data.batch import TrainingData

LARGEST_EXACT = 2**20
SKETCH_BITS = 14  # 2^14 registers
AT_ONCE = 4096  # samples, where many are looked up


class UniqueTexts:
    """Counts the texts of a run's samples."""

    def __init__(self, data: TrainingData):
        self._data = data
        self.seen = 0
        self._counter: set[int] | Any = set()  # or a sketch

    @property
    def unique(self) -> int:
        if isinstance(self._counter, set):
            return len(self._counter)
        return round(self._counter.get_estimate())

    def see(self, indices: range) -> None:
        """The samples at those places of the run are trained on."""
        for start in range(indices.start, indices.stop, AT_ONCE):
            beginnings = beginnings_in(self._data, range(start, min(indices.stop, start + AT_ONCE))).tolist()
            self.seen += len(beginnings)
            if isinstance(self._counter, set):
                self._counter.update(beginnings)
                if len(self._counter) > LARGEST_EXACT:
                    self._counter = sketch_of(self._counter)
            else:
                for beginning in beginnings:
                    self._counter.update(beginning)

    def state(self) -> tuple[str, np.ndarray]:
        """What a checkpoint keeps: "exact" or "sketch", and bytes [n]."""
        if isinstance(self._counter, set):
            kind, content = "exact", np.array(sorted(self._counter), dtype="<u8").tobytes()
        else:
            kind, content = "sketch", self._counter.serialize_updatable()
        return kind, np.frombuffer(self.seen.to_bytes(8, "little") + content, dtype=np.uint8).copy()

    def restore(self, kind: str, content: np.ndarray) -> None:
        """Goes on from `state`."""
        self.seen = int.from_bytes(content[:8].tobytes(), "little")
        if kind == "exact":
            self._counter = set(np.frombuffer(content[8:].tobytes(), dtype="<u8").tolist())
        else:
            import datasketches

            self._counter = datasketches.hll_sketch.deserialize(content[8:].tobytes())


def sketch_of(texts: Iterable[int]) -> Any:
    """A HyperLogLog sketch of 64-bit digests."""
    import datasketches

    sketch = datasketches.hll_sketch(SKETCH_BITS, datasketches.tgt_hll_type.HLL_8)
    for text in texts:
        sketch.update(text)
    return sketch


def beginnings_in(data: TrainingData, indices: range) -> np.ndarray:
    """Digests [texts] of the beginnings of the texts whose first token is in those samples."""
    samples = data.samples(np.asarray(indices))
    found = [np.zeros(0, np.uint64)]
    for name, source in data.sources.items():
        of_unit: dict[int, list[tuple[int, int]]] = {}
        for sample in samples:
            if sample.source.name == name:
                for unit, start, length in sample.pieces:
                    of_unit.setdefault(unit, []).append((start, start + length))
        for unit, pieces in of_unit.items():
            table = np.asarray(source.table(unit))
            bounds = np.array(pieces, dtype=np.uint64)
            first, end = first_from(table["start"], bounds[:, 0]), first_from(table["start"], bounds[:, 1])
            found += [table["beginning"][a:b] for a, b in zip(first.tolist(), end.tolist(), strict=True)]
    return np.concatenate(found)


def first_from(sorted_values: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each of `values` [n] the first place in `sorted_values` that is not below it.

    As `numpy.searchsorted`, which would copy a column of a mapped table, however long, at every call.
    """
    low, high = np.zeros(len(values), np.int64), np.full(len(values), len(sorted_values), np.int64)
    while (low < high).any():
        middle = (low + high) // 2
        below = (low < high) & (sorted_values[np.minimum(middle, len(sorted_values) - 1)] < values)
        low, high = np.where(below, middle + 1, low), np.where(below, high, np.minimum(high, middle))
    return low
