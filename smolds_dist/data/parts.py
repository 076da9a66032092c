"""Parts: what of a source is tokenised at once.

A unit is the smallest piece of work: it is read by one process, has an output of its own, and the order of samples is made
of units. Large files are cut into several, small ones travel together.
"""

from typing import NamedTuple

import numpy as np

from smolds_dist.data.order import key_for, permuted
from smolds_dist.data.source import COMPRESSED, File
from smolds_dist.settings import Source

UNIT_BYTES = 2**20  # small files travel together up to this size
PART_BYTES = 2**24  # larger files are cut, where their format can be
CUT = ("jsonl", "parquet")


class Part(NamedTuple):
    """One of `of` parts of a file."""

    file: int  # among the source's
    number: int
    of: int

    @property
    def whole(self) -> bool:
        return self.of == 1


def units_of_files(source: Source, files: list[File]) -> list[list[Part]]:
    """The units of a source, in an order that has nothing to do with the files' names."""
    parts, sizes = [], []
    for at, file in enumerate(files):
        cut = source.source.partition(":")[0] in CUT and not file.path.endswith(COMPRESSED)
        count = -(-file.size // PART_BYTES) if cut and file.size else 1
        parts += [Part(at, number, count) for number in range(count)]
        sizes += [file.size // count] * count
    units: dict[int, list[Part]] = {}
    for part, unit in zip(parts, units_of(sizes), strict=True):
        units.setdefault(unit, []).append(part)
    return [units[unit] for unit in sorted(units)]


def units_of(sizes: list[int]) -> list[int]:
    """The unit of each part of a source, whose sizes in bytes are given in the order of the names.

    Small ones travel together, up to `UNIT_BYTES`, but not with their neighbours: those are often alike, and the first
    window should be like the whole. So they are taken in a fixed order that has nothing to do with their names.
    """
    key = key_for("2 0 0 files")[None]
    order = np.argsort(permuted(np.arange(len(sizes)), np.full(len(sizes), len(sizes)), key))
    units, unit, size = [0] * len(sizes), -1, UNIT_BYTES
    for part in order.tolist():
        if size + sizes[part] > UNIT_BYTES:
            unit, size = unit + 1, 0
        size += sizes[part]
        units[part] = unit
    return units
