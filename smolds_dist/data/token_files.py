"""Pre-tokenized files: Megatron's .bin with .idx (`core/datasets/indexed_dataset.py`), datatrove's .ds with .ds.index
(`pipeline/tokens/tokenizer.py`), and flat arrays of ids (.npy, or .bin with a given dtype). Flat .npy files without NumPy's
header, as in OLMo-core, are read with the given dtype.
"""

import os
import struct
from collections.abc import Iterator
from itertools import pairwise
from tokenize import TokenError
from typing import Any, NamedTuple

import numpy as np

from smolds_dist.data.remote import file_system
from smolds_dist.data.source import BadFileError, File, open_file
from smolds_dist.errors import first_line
from smolds_dist.settings import Source

MEGATRON = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
BLOCK = 2**22  # tokens
NOT_NUMPY = (ValueError, TypeError, OverflowError, SyntaxError, TokenError)  # what NumPy raises at damaged headers


class Flat(NamedTuple):
    """All ids of a file whose documents end with the tokenizer's end-of-text token."""

    tokens: np.ndarray  # [tokens]


def read_tokens(file: File, source: Source, _chunk: tuple[int, int]) -> Iterator[tuple[int, Any]]:
    """Yield the documents of a file with an index, numbered from 1, or a flat file as one `Flat`."""
    stem, ending = os.path.splitext(file.path)
    if ending == ".bin" and _file_exists(f"{stem}.idx"):
        yield from _megatron(file.path, f"{stem}.idx")
    elif ending == ".ds":
        yield from _datatrove(file.path)
    else:
        yield 1, Flat(_flat(file.path, str(source.token_dtype)))


def _megatron(path: str, index_path: str) -> Iterator[tuple[int, np.ndarray]]:
    with open_file(index_path) as file:
        index = file.read()
    header = struct.calcsize("<9sQBQQ")
    if not index.startswith(MEGATRON) or len(index) < header:
        raise BadFileError("has an index that is not in Megatron's format")
    _, version, code, sequences, ends = struct.unpack_from("<9sQBQQ", index)
    if version != 1 or code not in MEGATRON_DTYPES or len(index) < header + 12 * sequences + 8 * ends:
        raise BadFileError("has a truncated index, or one of an unsupported version of Megatron")
    lengths = np.frombuffer(index, np.int32, sequences, header)
    bounds = np.frombuffer(index, np.int64, ends, header + 12 * sequences)  # in sequences
    tokens = _array(path, MEGATRON_DTYPES[code])
    starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    if not ends or bounds[-1] != sequences:  # some writers omit documents: each sequence is one
        bounds = np.arange(sequences + 1)
    if starts[-1] != len(tokens):
        raise BadFileError(f"has {len(tokens):,} tokens, but its index lists {starts[-1]:,}")
    if bounds[0] or (np.diff(bounds) < 0).any() or (lengths < 0).any():
        raise BadFileError("has a damaged index: its document offsets are not increasing")
    yield from enumerate((tokens[start:end] for start, end in pairwise(starts[bounds].tolist())), 1)


def _datatrove(path: str) -> Iterator[tuple[int, np.ndarray]]:
    if not _file_exists(f"{path}.index"):
        raise BadFileError(f"has no {os.path.basename(path)}.index next to it")
    ends = _array(f"{path}.index", "uint64").astype(np.int64)
    content = _array(path, "uint8")
    size = len(content) // int(ends[-1]) if len(ends) and ends[-1] else 2
    if size not in (2, 4) or not len(ends) or len(content) != size * ends[-1]:
        raise BadFileError(f"has {len(content):,} bytes, which is not 2 or 4 per token of its index")
    if ends[0] < 0 or (np.diff(ends) < 0).any():
        raise BadFileError("has a damaged index: its document offsets are not increasing")
    tokens = content.view(np.uint16 if size == 2 else np.uint32)
    for number, (start, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True), 1):
        yield number, tokens[start:end]


def _flat(path: str, dtype: str) -> np.ndarray:
    with open_file(path) as file:
        has_header = file.read(6) == b"\x93NUMPY"
    if not has_header:
        return _array(path, dtype)
    try:
        if _is_raw(path):
            tokens: np.ndarray = np.lib.format.open_memmap(path, mode="r")
        else:
            with open_file(path) as file:
                tokens = np.lib.format.read_array(file, allow_pickle=False)
    except NOT_NUMPY as error:  # truncated, damaged, or pickled objects
        raise BadFileError(f"cannot be read ({first_line(error)})") from None
    if tokens.dtype.kind not in "ui":
        raise BadFileError(f"contains {tokens.dtype} values instead of token ids")
    return tokens.reshape(-1)


def _array(path: str, dtype: str) -> np.ndarray:
    """Return a file's content, memory-mapped if possible, so that files larger than memory can be read."""
    if _is_raw(path):
        size = os.path.getsize(path)
        content = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    else:
        with open_file(path) as file:
            content = np.frombuffer(file.read(), np.uint8)
    if len(content) % np.dtype(dtype).itemsize:
        raise BadFileError(
            f"has {len(content):,} bytes, which is not a whole number of {dtype} ids; check data.token_dtype"
        )
    return content.view(dtype)


def _is_raw(path: str) -> bool:
    return "://" not in path and os.path.splitext(path)[1] in (".bin", ".npy", ".ds", ".index")


def _file_exists(path: str) -> bool:
    if "://" not in path:
        return os.path.exists(path)
    system, name = file_system(path)
    return system.exists(name)
