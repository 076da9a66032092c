"""Rows: what a file of each kind holds, one after the other, with the row's number; nothing is judged or changed here.

Corpora that others have tokenized: Megatron's .bin with its .idx (`core/datasets/indexed_dataset.py`), datatrove's .ds with
its .ds.index (`pipeline/tokens/tokenizer.py`), and flat arrays of ids (.npy, or .bin of a stated dtype). Flat .npy files
without NumPy's header, as OLMo-core has them, are read with the stated dtype.
"""

import codecs
import json
import lzma
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from smolds_dist.data.remote import file_system
from smolds_dist.data.source import BadFileError, File, hub_error, open_file
from smolds_dist.errors import ConfigError, first_line
from smolds_dist.settings import Source

# What a row is called where one is named.
PLACES = {"jsonl": "line", "parquet": "row", "arrow": "row", "hf": "row", "tokens": "document"}

MEGATRON = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
BLOCK = 2**22  # tokens


@dataclass(frozen=True)
class BadRow:
    """Stands where a row's text should be."""

    kind: str  # for counting
    why: str  # the end of a sentence that begins with the row's place


class Flat(NamedTuple):
    """A whole file's ids, whose documents end with the tokenizer's end-of-text token."""

    tokens: np.ndarray  # [tokens]


# A row's number in its file, from 1, and its text: a string, None, whatever else stands there, or an array of token ids.
Rows = Iterator[tuple[int, Any]]

WHOLE = (0, 1)  # the first of one part


def rows_of(file: File, source: Source, part: tuple[int, int] = WHOLE) -> Rows:
    """The rows of a file, or of a part of it, numbered there.

    Args:
        part: its number, and how many there are.

    Raises:
        BadFileError: where it is damaged, once the rows before the damage are given.
        ConfigError: where the text's column is not there, or an `hf` source cannot be read.
    """
    kind = source.source.partition(":")[0]
    if kind == "hf":
        yield from _hub_rows(source)
        return
    try:
        yield from READERS[kind](file, source, part)
    except _damage_errors() as error:
        strerror = getattr(error, "strerror", None)
        why = "cannot be read" if strerror else "is damaged"
        raise BadFileError(f"{why} ({strerror or first_line(error)})") from None


def rows_before(file: File, source: Source, part: tuple[int, int]) -> int:
    """How many rows of the file come before those of a part; reads the file up to there."""
    if part[0] == 0:
        return 0
    with open_file(file.path) as content:
        if source.source.startswith("parquet:"):
            import pyarrow.parquet as parquet

            described = parquet.ParquetFile(content).metadata
            before = range(_row_groups(described.num_row_groups, part).start)
            return sum(described.row_group(at).num_rows for at in before)
        left, lines = _first_byte(content, file.size, part), 0
        content.seek(0)
        while block := content.read(min(left, 2**22)):
            lines += block.count(b"\n")
            left -= len(block)
        return lines


def _damage_errors() -> tuple[type[Exception], ...]:
    """What readers and decompressors raise."""
    import pyarrow

    return OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException


def _read_source(file: File, _source: Source, _part: tuple[int, int]) -> Rows:
    # Python's own tests hold files that are empty or in no encoding, on purpose.
    with open(file.path, encoding="utf-8", errors="replace") as content:
        yield 1, content.read()


def _read_text(file: File, _source: Source, _part: tuple[int, int]) -> Rows:
    with open_file(file.path) as opened:
        content = opened.read()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadFileError(f"is not UTF-8 text (byte {error.start})") from None
    if text.removeprefix("\ufeff").strip():
        yield 1, text.replace("\r\n", "\n").replace("\r", "\n")


def _read_jsonl(file: File, source: Source, part: tuple[int, int]) -> Rows:
    with open_file(file.path) as lines:
        at, end = 0, math.inf
        if part != WHOLE:
            at, end = _first_byte(lines, file.size, part), _first_byte(lines, file.size, (part[0] + 1, part[1]))
            lines.seek(at)
        # Only b"\n" ends a line here: U+2028 and U+0085 may stand in a JSON string as they are.
        for number, line in enumerate(lines, 1):
            if at >= end:
                break
            if at == 0:
                line, at = line.removeprefix(codecs.BOM_UTF8), len(line)
            else:
                at += len(line)
            if line.strip():
                yield number, _field_of(line, str(source.text_field))


def _first_byte(lines: BinaryIO, size: int, part: tuple[int, int]) -> int:
    """Where the first line begins that begins in a part of a file's bytes."""
    at = size * part[0] // part[1]
    if 0 < at < size:
        lines.seek(at - 1)
        at += len(lines.readline()) - 1
    return at


def _field_of(line: bytes, field: str) -> Any:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadRow("no UTF-8", "bytes that are no UTF-8 text")
    except (json.JSONDecodeError, RecursionError):
        row = None
    if not isinstance(row, dict):
        return BadRow("no JSON object", "no JSON object")
    found, value = _look_up(row, field)
    if not found:
        return BadRow("no field", f"no field {field!r}; {_advice(_text_fields(row))}")
    if isinstance(value, str):
        # JSON can spell half a surrogate pair, which no tokenizer takes.
        value = value.encode(errors="replace").decode()
    return _text_or_bad(value, field, row)


def _text_or_bad(value: Any, field: str, row: dict) -> Any:
    """A string or None as it is, and what to say of anything else."""
    if value is None or isinstance(value, str):
        return value
    kind = type(value).__name__
    where = f"a value of type {kind} in the field {field!r}, where a string should be"
    return BadRow(f"type {kind}", f"{where}; {_advice(_text_fields(row))}")


def _advice(fields: list[str]) -> str:
    several = "one of " if len(fields) > 1 else ""
    return f"set --data.text_field to {several}{', '.join(fields)}" if fields else "no field holds text"


def _look_up(row: dict, field: str) -> tuple[bool, Any]:
    """Whether the row has a field, and its value; `a.b` is the field of that name, or else the field b of the field a."""
    if field in row:
        return True, row[field]
    value: Any = row
    for part in field.split("."):
        if value is None:
            return True, None
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, value


def _text_fields(row: dict, prefix: str = "") -> list[str]:
    found = []
    for name, value in row.items():
        if isinstance(value, dict):
            found += _text_fields(value, f"{prefix}{name}.")
        found += [prefix + name] if isinstance(value, str) else []
    return found


def _read_parquet(file: File, source: Source, part: tuple[int, int]) -> Rows:
    import pyarrow.parquet as parquet

    with open_file(file.path, seekable=True) as content:
        opened = parquet.ParquetFile(content)
        column = _column(file.path, opened.schema_arrow, str(source.text_field))
        groups = _row_groups(opened.num_row_groups, part)
        batches = opened.iter_batches(row_groups=groups, columns=[".".join(column)], batch_size=4096)
        yield from _column_rows(batches, column)


def _row_groups(count: int, part: tuple[int, int]) -> range:
    """Those of a part of a file; a part can have none."""
    return range(count * part[0] // part[1], count * (part[0] + 1) // part[1])


def _read_arrow(file: File, source: Source, _part: tuple[int, int]) -> Rows:
    import pyarrow

    with open_file(file.path, seekable=True) as content:
        try:
            opened = pyarrow.ipc.open_file(content)
            batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
        except pyarrow.ArrowInvalid:  # then it is a stream, as the `datasets` library writes it
            content.seek(0)
            opened = batches = pyarrow.ipc.open_stream(content)
        yield from _column_rows(batches, _column(file.path, opened.schema, str(source.text_field)))


def _column(path: str, schema: Any, field: str) -> list[str]:
    """The way to a column of text: its name, or those of the structs around it.

    Raises:
        ConfigError: where there is none, or it holds something else than text.
    """
    import pyarrow.types as types

    way = [field] if field in schema.names else field.split(".")
    kind: Any = schema
    for name in way:
        has_fields = kind is schema or types.is_struct(kind)
        if not has_fields or kind.get_field_index(name) < 0:
            raise ConfigError(f"{path} has no column {field!r}; {_advice(_text_columns(schema))}.")
        kind = kind.field(name).type
    if not (_is_text(kind) or types.is_null(kind)):
        raise ConfigError(
            f"{path} has values of type {kind} in the column {field!r}, where text should be; "
            f"{_advice(_text_columns(schema))}."
        )
    return way


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _text_columns(fields: Any, prefix: str = "") -> list[str]:
    import pyarrow.types as types

    found = []
    for field in fields:
        if _is_text(field.type):
            found.append(prefix + field.name)
        elif types.is_struct(field.type):
            found += _text_columns(field.type, f"{prefix}{field.name}.")
    return found


def _column_rows(batches: Any, way: list[str]) -> Rows:
    import pyarrow.compute

    number = 0
    for batch in batches:
        column = batch.column(way[0])
        for name in way[1:]:
            column = pyarrow.compute.struct_field(column, name)  # null where the struct is
        for text in column.to_pylist():
            number += 1
            yield number, text


def _hub_rows(source: Source) -> Rows:
    import datasets

    name, _, config_name = source.source.removeprefix("hf:").partition(":")
    field = str(source.text_field)
    try:
        rows = datasets.load_dataset(name, config_name or None, split=source.split, streaming=True)
        for number, row in enumerate(rows, 1):
            found, value = _look_up(row, field)
            if not found:
                raise ConfigError(f"{source.source!r} has no column {field!r}; {_advice(_text_fields(row))}.")
            yield number, _text_or_bad(value, field, row)
    except ConfigError:
        raise
    except Exception as error:  # of the network, the name, the files: datasets has no common type for them
        raise hub_error(source, error) from None


def _read_tokens(file: File, source: Source, _part: tuple[int, int]) -> Rows:
    stem, ending = os.path.splitext(file.path)
    if ending == ".bin" and _exists(f"{stem}.idx"):
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
        raise BadFileError("has an index that is none of Megatron's")
    _, version, code, sequences, ends = struct.unpack_from("<9sQBQQ", index)
    if version != 1 or code not in MEGATRON_DTYPES or len(index) < header + 12 * sequences + 8 * ends:
        raise BadFileError("has an index of another version of Megatron's, or a part of one")
    lengths = np.frombuffer(index, np.int32, sequences, header)
    bounds = np.frombuffer(index, np.int64, ends, header + 12 * sequences)  # in sequences
    tokens = _array(path, MEGATRON_DTYPES[code])
    starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    if not ends or bounds[-1] != sequences:  # some writers leave the documents out: then each sequence is one
        bounds = np.arange(sequences + 1)
    if starts[-1] != len(tokens):
        raise BadFileError(f"has {len(tokens):,} tokens, its index {starts[-1]:,}")
    yield from enumerate((tokens[start:end] for start, end in pairwise(starts[bounds].tolist())), 1)


def _datatrove(path: str) -> Iterator[tuple[int, np.ndarray]]:
    if not _exists(f"{path}.index"):
        raise BadFileError(f"has no {os.path.basename(path)}.index beside it")
    ends = _array(f"{path}.index", "uint64").astype(np.int64)
    content = _array(path, "uint8")
    size = len(content) // int(ends[-1]) if len(ends) and ends[-1] else 2
    if size not in (2, 4) or not len(ends) or len(content) != size * ends[-1]:
        raise BadFileError(f"has {len(content):,} bytes, which are not 2 or 4 for each token of its index")
    tokens = content.view(np.uint16 if size == 2 else np.uint32)
    for number, (start, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True), 1):
        yield number, tokens[start:end]


def _flat(path: str, dtype: str) -> np.ndarray:
    with open_file(path) as file:
        has_header = file.read(6) == b"\x93NUMPY"
    if not has_header:
        return _array(path, dtype)
    try:
        if _is_plain(path):
            tokens: np.ndarray = np.lib.format.open_memmap(path, mode="r")
        else:
            with open_file(path) as file:
                tokens = np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:  # cut short, or objects, which would have to be unpickled
        raise BadFileError(f"cannot be read ({first_line(error)})") from None
    if tokens.dtype.kind not in "ui":
        raise BadFileError(f"holds {tokens.dtype}, no token ids")
    return tokens.reshape(-1)


def _array(path: str, dtype: str) -> np.ndarray:
    """A file's content; mapped, so that one larger than memory can be read."""
    if _is_plain(path):
        size = os.path.getsize(path)
        content = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    else:
        with open_file(path) as file:
            content = np.frombuffer(file.read(), np.uint8)
    if len(content) % np.dtype(dtype).itemsize:
        raise BadFileError(f"has {len(content):,} bytes, no whole number of {dtype} ids; see data.token_dtype")
    return content.view(dtype)


def _is_plain(path: str) -> bool:
    return "://" not in path and os.path.splitext(path)[1] in (".bin", ".npy", ".ds", ".index")


def _exists(path: str) -> bool:
    if "://" not in path:
        return os.path.exists(path)
    system, name = file_system(path)
    return system.exists(name)


READERS: dict[str, Callable[[File, Source, tuple[int, int]], Rows]] = {
    "stdlib": _read_source,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "tokens": _read_tokens,
}
