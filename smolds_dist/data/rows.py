"""Rows: the unchanged content of a file of each kind, row by row with the row's number."""

import codecs
import gzip
import json
import lzma
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from smolds_dist.data.remote import reason
from smolds_dist.data.source import BadFileError, File, hub_error, open_file
from smolds_dist.data.token_files import read_tokens
from smolds_dist.errors import ConfigError, first_line
from smolds_dist.settings import Source

# What messages call a row.
ROW_NAMES = {"jsonl": "line", "parquet": "row", "arrow": "row", "hf": "row", "tokens": "document"}


@dataclass(frozen=True)
class BadRow:
    """Takes the place of an invalid row's text."""

    kind: str  # for counting
    why: str  # follows the row's location in messages


NO_UTF8 = "no UTF-8", "not UTF-8 text"


# A row's number, from 1, and its value: a string, None, another type, or an array of token ids.
Rows = Iterator[tuple[int, Any]]

WHOLE_FILE = (0, 1)  # the first of one chunk

# Integers become their number of digits: Python converts at most 4,300 digits, and no integer is text.
decode_json = json.JSONDecoder(parse_int=len).decode


def rows_of(file: File, source: Source, chunk: tuple[int, int] = WHOLE_FILE) -> Rows:
    """Yield the rows of a file or of a chunk of it; numbers start at 1 in the chunk.

    Args:
        chunk: its number, and the number of chunks.

    Raises:
        BadFileError: if the file is damaged, after the rows before the damage.
        ConfigError: if the text column is missing, an `hf` source cannot be read, or reading fails for another reason
            than the content, such as a permission or a server's response.
    """
    kind = source.source.partition(":")[0]
    if kind == "hf":
        yield from _hub_rows(source)
        return
    try:
        yield from READERS[kind](file, source, chunk)
    except _damage_errors() as error:
        # For damaged content, readers and decompressors raise a plain OSError without errno.
        if isinstance(error, OSError) and (error.errno or type(error) not in (OSError, gzip.BadGzipFile)):
            raise ConfigError(
                f"{file.path} cannot be read ({error.strerror or reason(error)}); fix its access and restart, or remove "
                "it from the source."
            ) from None
        if "too much memory" in str(error):
            raise BadFileError("has a zstd window over 128 MB; recompress it without --long or --ultra") from None
        raise BadFileError(f"is damaged ({first_line(error)})") from None


def rows_before(file: File, source: Source, chunk: tuple[int, int]) -> int:
    """Return how many rows of the file come before a chunk; reads the file up to there."""
    if chunk[0] == 0:
        return 0
    with open_file(file.path) as content:
        if source.source.startswith("parquet:"):
            import pyarrow.parquet as parquet

            described = parquet.ParquetFile(content).metadata
            before = range(_row_groups(described.num_row_groups, chunk).start)
            return sum(described.row_group(at).num_rows for at in before)
        left, lines = _first_byte(content, file.size, chunk), 0
        content.seek(0)
        while block := content.read(min(left, 2**22)):
            lines += block.count(b"\n")
            left -= len(block)
        return lines


def _damage_errors() -> tuple[type[Exception], ...]:
    """Return the errors that readers and decompressors raise."""
    import pyarrow

    return OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException, UnicodeDecodeError  # column names


def _read_source(file: File, _source: Source, _chunk: tuple[int, int]) -> Rows:
    # Some files of Python's own tests are deliberately empty or have invalid encodings.
    with open(file.path, encoding="utf-8", errors="replace") as content:
        yield 1, content.read()


def _read_text(file: File, _source: Source, _chunk: tuple[int, int]) -> Rows:
    with open_file(file.path) as opened:
        content = opened.read()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadFileError(f"is not UTF-8 text (byte {error.start})") from None
    if text.removeprefix("\ufeff").strip():
        yield 1, text.replace("\r\n", "\n").replace("\r", "\n")


def _read_jsonl(file: File, source: Source, chunk: tuple[int, int]) -> Rows:
    with open_file(file.path) as lines:
        at, end = 0, math.inf
        if chunk != WHOLE_FILE:
            at, end = _first_byte(lines, file.size, chunk), _first_byte(lines, file.size, (chunk[0] + 1, chunk[1]))
            lines.seek(at)
        # Only b"\n" ends a line here: U+2028 and U+0085 may be unescaped in a JSON string.
        for number, line in enumerate(lines, 1):
            if at >= end:
                break
            if at == 0:
                line, at = line.removeprefix(codecs.BOM_UTF8), len(line)
            else:
                at += len(line)
            if line.strip():
                yield number, _field_of(line, str(source.text_field))


def _first_byte(lines: BinaryIO, size: int, chunk: tuple[int, int]) -> int:
    """Return the offset of the first line that begins in a chunk of a file's bytes."""
    at = size * chunk[0] // chunk[1]
    if 0 < at < size:
        lines.seek(at - 1)
        at += len(lines.readline()) - 1
    return at


def _field_of(line: bytes, field: str) -> Any:
    try:
        row = decode_json(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadRow(*NO_UTF8)
    except (json.JSONDecodeError, RecursionError):
        row = None
    if not isinstance(row, dict):
        return BadRow("no JSON object", "not a JSON object")
    found, value = _look_up(row, field)
    if not found:
        return BadRow("no field", f"no field {field!r}; {_advice(_text_fields(row))}")
    if isinstance(value, str):
        # JSON can contain half a surrogate pair, which tokenizers do not accept.
        value = value.encode(errors="replace").decode()
    return _text_or_bad(value, field, row)


def _text_or_bad(value: Any, field: str, row: dict) -> Any:
    """Return a string or None unchanged, anything else as a `BadRow`."""
    if value is None or isinstance(value, str):
        return value
    kind = type(value).__name__
    problem = f"the field {field!r} has a value of type {kind} instead of a string"
    return BadRow(f"type {kind}", f"{problem}; {_advice(_text_fields(row))}")


def _advice(fields: list[str]) -> str:
    several = "one of " if len(fields) > 1 else ""
    names = ", ".join(name if name.isprintable() else ascii(name) for name in fields[:20])
    return f"set --data.text_field to {several}{names}" if fields else "no field contains text"


def _look_up(row: dict, field: str) -> tuple[bool, Any]:
    """Return whether the row has a field, and its value; `a.b` is the field of that name, else the field b of field a."""
    if field in row:
        return True, row[field]
    value: Any = row
    for name in field.split("."):
        if value is None:
            return True, None
        if not isinstance(value, dict) or name not in value:
            return False, None
        value = value[name]
    return True, value


def _text_fields(row: dict, prefix: str = "") -> list[str]:
    found = []
    for name, value in row.items():
        if isinstance(value, dict) and prefix.count(".") < 20:
            found += _text_fields(value, f"{prefix}{name}.")
        found += [prefix + name] if isinstance(value, str) else []
    return found


def _read_parquet(file: File, source: Source, chunk: tuple[int, int]) -> Rows:
    import pyarrow.parquet as parquet

    with open_file(file.path, seekable=True) as content:
        opened = parquet.ParquetFile(content)
        column = _column(file.path, opened.schema_arrow, str(source.text_field))
        groups = _row_groups(opened.num_row_groups, chunk)
        batches = opened.iter_batches(row_groups=groups, columns=[".".join(column)], batch_size=4096)
        yield from _column_rows(batches, column)


def _row_groups(count: int, chunk: tuple[int, int]) -> range:
    """Return the row groups of a chunk of a file; may be empty."""
    return range(count * chunk[0] // chunk[1], count * (chunk[0] + 1) // chunk[1])


def _read_arrow(file: File, source: Source, _chunk: tuple[int, int]) -> Rows:
    import pyarrow

    with open_file(file.path, seekable=True) as content:
        try:
            opened = pyarrow.ipc.open_file(content)
            batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
        except pyarrow.ArrowInvalid:  # a stream, as written by the `datasets` library
            content.seek(0)
            opened = batches = pyarrow.ipc.open_stream(content)
        yield from _column_rows(batches, _column(file.path, opened.schema, str(source.text_field)))


def _column(path: str, schema: Any, field: str) -> list[str]:
    """Return the path to a text column: its name, or those of the structs around it and its own.

    Raises:
        ConfigError: if it is missing, or contains something other than text.
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
            f"{path} has values of type {kind} in the column {field!r} instead of text; {_advice(_text_columns(schema))}."
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
            column = pyarrow.compute.struct_field(column, name)  # null if the struct is
        for text in _texts_in(column):
            number += 1
            yield number, text


def _texts_in(column: Any) -> Iterator[Any]:
    """Yield strings, None, or a `BadRow` for invalid UTF-8; raise an ArrowException if the column is damaged."""
    import pyarrow
    import pyarrow.types as types

    try:
        column.validate(full=True)  # a damaged file has arbitrary offsets
        yield from column.to_pylist()
        return
    except pyarrow.ArrowInvalid:
        if types.is_string(column.type) or types.is_large_string(column.type):
            width = pyarrow.binary() if types.is_string(column.type) else pyarrow.large_binary()
            column.view(width).validate(full=True)
    for value in column:
        try:
            yield value.as_py()
        except UnicodeDecodeError:
            yield BadRow(*NO_UTF8)


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
    except Exception as error:  # datasets has no common type for errors of network, name and files
        raise hub_error(source, error) from None


READERS: dict[str, Callable[[File, Source, tuple[int, int]], Rows]] = {
    "stdlib": _read_source,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "tokens": read_tokens,
}
