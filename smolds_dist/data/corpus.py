"""Documents of a source, in a fixed order: `stdlib`, `text:GLOB`, `jsonl:GLOB`, `parquet:GLOB` or `hf:NAME[:CONFIG]`."""

import codecs
import glob
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolds_dist.config import Data
from smolds_dist.errors import ConfigError

BYTE_ORDER_MARK = "\ufeff"


class _BadFileError(Exception):
    """What is wrong with a file, as the end of a sentence that begins with its path."""


@dataclass(frozen=True)
class _BadRow:
    """Stands for the text of a row that has none which could be read."""

    why: str  # the end of a sentence that begins with the row's place


@dataclass
class RowCount:
    """How many rows of a source have been read so far, and how many of them were null, empty or blank."""

    read: int = 0
    without_text: int = 0

    def __str__(self) -> str:
        return f"{self.without_text:,} of {self.read:,} rows hold no text (null, empty or blank); left out."


# A row's place in its file, such as "line 3", and what stands there where a text should.
Rows = Iterator[tuple[str, Any]]


def documents(data: Data, say: Callable[[str], None] = lambda _: None, count: RowCount | None = None) -> Iterator[str]:
    """The texts of `data.source`, files in the order of their names, as they are but for a byte order mark.

    Rows that are null, empty or blank are no documents.

    Args:
        say: told of each file that is empty or damaged and each one with rows that hold no string, where `data.on_bad_file`
            is skip.
        count: counts the rows.

    Raises:
        ConfigError: where the source has nothing to read, or a file is empty or damaged, or a row holds no string in
            `data.text_field`, and is not to be skipped.
    """
    count = count or RowCount()
    for name, rows in _opened(data):
        read, bad = count.read, []
        try:
            for place, text in rows:
                count.read += 1
                if isinstance(text, str):
                    text = text.removeprefix(BYTE_ORDER_MARK)
                    if text.strip():
                        yield text
                    else:
                        count.without_text += 1
                elif text is None:
                    count.without_text += 1
                else:
                    bad.append(f"{place} {_no_text(text, data.text_field)}")
                    if data.on_bad_file == "refuse":
                        raise _BadFileError(f"has in {bad[0]}")
            if count.read == read:
                raise _BadFileError("is empty")
        except (_BadFileError, OSError) as error:
            why = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
            if data.on_bad_file == "refuse":
                raise ConfigError(f"{name} {why}; mend or remove it, or use --data.on_bad_file skip.") from None
            say(f"{name} {why}; {'left out' if count.read == read else 'its rest was left out'}.")
        if bad:
            rows_were = "this row was" if len(bad) == 1 else f"this and {len(bad) - 1:,} more rows were"
            say(f"{name} has in {bad[0]}; {rows_were} left out.")


def _opened(data: Data) -> Iterator[tuple[str, Rows]]:
    """What the source consists of, each part with its name."""
    kind, _, rest = data.source.partition(":")
    if kind == "hf":
        yield data.source, _hub_rows(rest, data)
        return
    readers = {"stdlib": _read_source, "text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
    for path in _files(data.source):
        yield path, readers[kind](path, data)


def _no_text(value: Any, field: str) -> str:
    if isinstance(value, _BadRow):
        return value.why
    return f"a value of type {type(value).__name__} in the field {field!r}, where a string should be"


def fingerprint(data: Data) -> dict:
    """What the documents depend on, without reading them: it changes when a file is added, removed or edited."""
    described = {"source": data.source, "text_field": data.text_field, "split": data.split}
    if data.on_bad_file == "skip":
        described["on_bad_file"] = "skip"
    if data.source.startswith("hf:"):
        return described
    files = _files(data.source)
    if data.source == "stdlib":
        # Several machines with the same Python share these shards: installation times don't count.
        return {"source": "stdlib", "python": sys.version, "sizes": [os.path.getsize(f) for f in files]}
    return described | {"files": [(os.path.abspath(f), os.path.getsize(f), os.stat(f).st_mtime_ns) for f in files]}


def _files(source: str) -> list[str]:
    kind, _, pattern = source.partition(":")
    if kind == "stdlib":
        return _stdlib_files()
    files = sorted(f for f in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(f))
    if not files:
        raise ConfigError(
            f"--data.source {source!r} matches no file; check the pattern and the folder it is read from."
        )
    return files


def _stdlib_files() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (f for f in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(f.relative_to(root).parts))
    return [str(f) for f in sorted(files)]


def _read_source(path: str, _data: Data) -> Rows:
    # Python's own tests hold files that are empty or in no encoding, on purpose.
    yield "file", Path(path).read_text(encoding="utf-8", errors="replace")


def _read_text(path: str, _data: Data) -> Rows:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _BadFileError(f"is not UTF-8 text (byte {error.start})") from None
    if text.strip():
        yield "file", text


def _read_jsonl(path: str, data: Data) -> Rows:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield f"line {number:,}", _field_of(line, data.text_field)


def _field_of(line: bytes, field: str) -> Any:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return _BadRow("bytes that are no UTF-8 text")
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict):
        return _BadRow("no JSON object")
    if field not in row:
        return _BadRow(f"no field {field!r}; set --data.text_field to one of {', '.join(row)}")
    value = row[field]
    # JSON can spell half a surrogate pair, which no tokenizer takes.
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _read_parquet(path: str, data: Data) -> Rows:
    import pyarrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        file = parquet.ParquetFile(path)
        if data.text_field not in file.schema_arrow.names:
            raise ConfigError(
                f"{path} has no column {data.text_field!r}; set --data.text_field to one of "
                f"{', '.join(file.schema_arrow.names)}."
            )
        for batch in file.iter_batches(columns=[data.text_field]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield f"row {number:,}", text
    except (pyarrow.ArrowException, OSError) as error:
        raise _BadFileError(f"is damaged ({str(error).splitlines()[0].rstrip('.')})") from None


def _hub_rows(rest: str, data: Data) -> Rows:
    import datasets

    name, _, config_name = rest.partition(":")
    try:
        rows = datasets.load_dataset(name, config_name or None, split=data.split, streaming=True)
        for number, row in enumerate(rows, 1):
            if data.text_field not in row:
                raise ConfigError(
                    f"{data.source!r} has no column {data.text_field!r}; set --data.text_field to one of {', '.join(row)}."
                )
            yield f"row {number:,}", row[data.text_field]
    except ConfigError:
        raise
    except Exception as error:  # of the network, the name, the files: datasets has no common type for them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"--data.source {data.source!r} could not be read ({reason}); "
            "check the name, the network, and HF_TOKEN for a gated data set."
        ) from None
